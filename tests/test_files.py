"""Files that are whole or absent, checkpoints, one maker at a time, and the pure functions around a run."""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import TinyNet
from torch import nn

from brqat import checkpoint, schedule
from brqat.devices import claimed_device
from brqat.files import append_jsonl, finite, read_jsonl, write_json, write_whole
from brqat.provenance import content_hash
from brqat.settings import LEAST, Settings
from brqat.tracking.files import RunFiles

# ---- whole files


def test_write_whole_replaces_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_write_whole_leaves_the_old_file_and_no_temporary_when_the_writer_raises(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails_half_way(file):
        file.write(b"half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails_half_way)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    write_whole(path, write)
    assert seen == [b"old"] and path.read_bytes() == b"new"


def test_finite_turns_what_json_cannot_say_into_null(tmp_path):
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": (np.float64("nan"), 2), "e": "nan", "f": None}
    expected = {"a": None, "b": [1.5, None, {"c": None}], "d": [None, 2], "e": "nan", "f": None}
    assert finite(value) == expected
    write_json(tmp_path / "value.json", value)
    append_jsonl(tmp_path / "value.jsonl", [value])
    assert json.loads((tmp_path / "value.json").read_text()) == expected
    assert list(read_jsonl(tmp_path / "value.jsonl")) == [expected]


def test_read_jsonl_leaves_out_a_last_line_that_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"epoch": i, "text": "ä"} for i in range(3)]
    append_jsonl(path, rows[:1])
    append_jsonl(path, rows[1:])
    assert list(read_jsonl(path)) == rows
    text = path.read_bytes()
    last = text.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(text) - 1):  # every place where a kill may cut the last line
        path.write_bytes(text[:end])
        assert list(read_jsonl(path)) == rows[:2]
    assert list(read_jsonl(tmp_path / "missing.jsonl")) == []


# ---- a run's folder


def epoch_files(folder, epochs=4):
    files = RunFiles(folder)
    for epoch in range(epochs):
        levels = [{"epoch": epoch, "site": site} for site in ("a.weight", "b@x.weight")]
        histograms = {f"{row['site']}@{epoch}": np.arange(3) + epoch for row in levels}
        edges = {f"{row['site']}@edges": np.linspace(0, 1, 4) for row in levels}
        files.add_epoch({"epoch": epoch, "loss": 1.0 / (epoch + 1)}, levels, histograms | edges)
    return files


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 10])
def test_cut_after_keeps_exactly_what_was_written_up_to_the_epoch(tmp_path, epoch):
    files = epoch_files(tmp_path)
    with open(files.metrics, "a") as file:
        file.write('{"epoch": 4, "lo')
    files.cut_after(epoch)
    kept = [e for e in range(4) if e <= epoch]
    assert list(read_jsonl(files.metrics)) == [{"epoch": e, "loss": 1.0 / (e + 1)} for e in kept]
    assert [row["epoch"] for row in read_jsonl(files.levels)] == [e for e in kept for _ in range(2)]
    stored = files.read_histograms()
    names = ("a.weight", "b@x.weight")
    assert stored.keys() == {f"{name}@{end}" for name in names for end in (*kept, "edges")}
    assert all((stored[f"{name}@{e}"] == np.arange(3) + e).all() for name in names for e in kept)
    append_jsonl(files.metrics, [{"epoch": epoch + 1}])  # on a line of its own, behind a cut-off one
    assert [row["epoch"] for row in read_jsonl(files.metrics)] == [*kept, epoch + 1]


def test_epochs_gives_metrics_with_their_levels_and_histograms(tmp_path):
    pairs = epoch_files(tmp_path, 2).epochs()
    assert [metrics["epoch"] for metrics, _, _ in pairs] == [0, 1]
    assert [[row["site"] for row in levels] for _, levels, _ in pairs] == [["a.weight", "b@x.weight"]] * 2
    for epoch, (_, _, histograms) in enumerate(pairs):
        assert {key.rpartition("@")[2] for key in histograms} <= {str(epoch), "edges"}


def test_an_empty_run_folder_has_nothing_to_cut_or_read(tmp_path):
    files = RunFiles(tmp_path)
    files.cut_after(3)
    assert files.epochs() == [] and files.read_summary() is None and os.listdir(tmp_path) == []
    files.write_summary({"val_acc": math.nan})
    assert files.read_summary() == {"val_acc": None}


# ---- checkpoints


def test_save_and_load_round_trip(tmp_path):
    state = {
        "model": OrderedDict(a=torch.randn(3, 2), b=torch.tensor(2, dtype=torch.int16)),
        "epoch": 3,
        "best": None,
        "list": [1.5, "text", (True, 2)],
    }
    checkpoint.save(tmp_path / "last.pt", state)
    loaded = checkpoint.load(tmp_path / "last.pt")
    model, other = state.pop("model"), loaded.pop("model")
    assert loaded == state and other.keys() == model.keys()
    assert all(torch.equal(model[k], other[k]) and model[k].dtype == other[k].dtype for k in model)
    assert os.listdir(tmp_path) == ["last.pt"]


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


INTERRUPTED = """
import signal, sys, time, torch
from pathlib import Path
from brqat import checkpoint

def stop(*_):
    raise SystemExit(143)

signal.signal(signal.SIGALRM, stop)
path, state = Path(sys.argv[1]), {f"weight{i}": torch.randn(3000) for i in range(60)}

def seconds():
    started = time.perf_counter()
    checkpoint.save(path, state)
    return time.perf_counter() - started

whole, stopped = min(seconds() for _ in range(5)), 0  # the first save is slow: it imports
for attempt in range(200):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, whole * (attempt + 1) / 200)
            checkpoint.save(path, state)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except SystemExit:
        stopped += 1
    assert checkpoint.load(path).keys() == state.keys()
print(stopped)
"""


def test_signal_in_the_midst_of_a_save_comes_out_as_what_its_handler_raised(tmp_path):
    """torch's writer makes a RuntimeError of it, or aborts, where it writes to a file itself."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, tmp_path / "a.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_load_refuses_code_and_does_not_run_it(tmp_path, how):
    trace, path = tmp_path / "was_run", tmp_path / "file.pt"
    if how == "torch":
        torch.save({"model": Harmful(str(trace))}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Harmful(str(trace))}, protocol=2))
    with pytest.raises(ValueError, match=r"file\.pt cannot be read"):
        checkpoint.load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Harmful(str(trace))))
    assert trace.exists()  # it would have left its trace


def test_load_refuses_garbage_and_cut_files(tmp_path):
    path = tmp_path / "file.pt"
    checkpoint.save(path, {"a": torch.randn(1000)})
    whole = path.read_bytes()
    for content in (b"", b"garbage", bytes(range(256)) * 20, whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"file\.pt cannot be read"):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "missing.pt")


def draws():
    return [
        torch.randn(3).tolist(),
        np.random.randn(3).tolist(),  # an odd count: numpy keeps the next Gaussian for later
        np.random.randint(0, 1000, 5).tolist(),
        [random.random(), random.gauss(0, 1)],
    ]


def test_random_states_come_back_through_a_file(tmp_path):
    checkpoint.seed_everything(5)
    draws()
    checkpoint.save(tmp_path / "random.pt", checkpoint.random_states())
    first, second = draws(), draws()
    assert first != second
    checkpoint.set_random_states(checkpoint.load(tmp_path / "random.pt"))
    assert draws() == first and draws() == second


def test_seed_everything_sets_all_three_generators():
    checkpoint.seed_everything(7)
    first = draws()
    checkpoint.seed_everything(7)
    assert draws() == first
    checkpoint.seed_everything(8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


# ---- float weights from elsewhere


def other_net():
    torch.manual_seed(99)
    return TinyNet()


@pytest.mark.parametrize("wrapped", [False, True])
def test_load_float_weights_takes_a_state_dict_or_a_runs_file_and_passes_over_quantizers(tmp_path, quantized, wrapped):
    state = {key: value for key, value in quantized.state_dict().items() if isinstance(value, torch.Tensor)}
    assert any("_quantizer." in key for key in state)
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"model": state, "epoch": 3} if wrapped else state)
    model = other_net()
    checkpoint.load_float_weights(model, path)
    loaded = model.state_dict()
    assert loaded and all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_load_float_weights_reads_the_whole_state_of_a_quantized_run(tmp_path, quantized):
    checkpoint.save(tmp_path / "last.pt", {"model": quantized.state_dict()})
    model = other_net()
    checkpoint.load_float_weights(model, tmp_path / "last.pt")
    assert torch.equal(model.conv3.weight, quantized.conv3.weight)


def break_missing(state):
    del state["conv2.weight"]


def break_unknown(state):
    state["head.weight"] = torch.zeros(2)


def break_shape(state):
    state["fc.weight"] = torch.zeros(10, 8)


@pytest.mark.parametrize(
    "faults, said",
    [
        ([break_missing], ["1 missing (conv2.weight)"]),
        ([break_unknown], ["1 unknown (head.weight)"]),
        ([break_shape], ["1 of another shape (fc.weight)"]),
        (
            [break_missing, break_unknown, break_shape],
            ["1 missing (conv2.weight)", "1 unknown (head.weight)", "1 of another shape (fc.weight)"],
        ),
    ],
)
def test_load_float_weights_names_what_does_not_fit_and_loads_nothing(tmp_path, faults, said):
    state = {key: value + 1 for key, value in TinyNet().state_dict().items()}
    for fault in faults:
        fault(state)
    checkpoint.save(tmp_path / "weights.pt", state)
    model = other_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        checkpoint.load_float_weights(model, tmp_path / "weights.pt")
    message = str(error.value)
    assert all(words in message for words in [*said, "TinyNet", "weights.pt"])
    assert ("missing" in message) == (break_missing in faults)
    assert ("unknown" in message) == (break_unknown in faults)
    assert ("shape" in message) == (break_shape in faults)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_load_float_weights_says_that_a_path_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.pt does not exist"):
        checkpoint.load_float_weights(nn.Linear(2, 2), tmp_path / "nowhere.pt")


# ---- one maker at a time

MAKER = """
import sys, time
from pathlib import Path
from brqat.checkpoint import once

folder, name = Path(sys.argv[1]), sys.argv[2]
signs = folder.parent

def make():
    with open(signs / "makes", "a") as file:
        file.write(name + chr(10))
    (signs / "making").touch()
    while not (signs / "release").exists():
        time.sleep(0.01)
    (folder / "made").write_text(name)

(signs / f"ready-{name}").touch()
while not (signs / f"go-{name}").exists():
    time.sleep(0.01)
once(folder, (folder / "made").exists, make, (signs / f"waiting-{name}").touch)
assert (folder / "made").exists()
"""


class Makers:
    """Processes that want the same thing, in one folder."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = {}

    def start(self, name):
        words = [sys.executable, "-c", MAKER, str(self.folder / "cache" / "thing"), name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        (self.folder / "cache").mkdir(exist_ok=True)
        self.processes[name] = subprocess.Popen(words, env=environment)

    def await_sign(self, name):
        path, end = self.folder / "cache" / name, time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < end, f"{name} did not come"
            time.sleep(0.01)

    def go(self, name):
        (self.folder / "cache" / f"go-{name}").touch()

    def release(self):
        """Lets whoever makes it finish."""
        (self.folder / "cache" / "release").touch()

    def makes(self):
        return (self.folder / "cache" / "makes").read_text().split()


@pytest.fixture
def makers(tmp_path):
    found = Makers(tmp_path)
    yield found
    for process in found.processes.values():
        if process.poll() is None:
            process.kill()
        process.wait()


def test_of_several_processes_that_want_the_same_thing_exactly_one_makes_it(makers):
    names = ["a", "b", "c"]
    for name in names:
        makers.start(name)
    for name in names:
        makers.await_sign(f"ready-{name}")
    for name in names:
        makers.go(name)
    makers.await_sign("making")
    (maker,) = makers.makes()
    for name in set(names) - {maker}:
        makers.await_sign(f"waiting-{name}")
    makers.release()
    assert [makers.processes[name].wait(timeout=60) for name in names] == [0, 0, 0]
    assert makers.makes() == [maker]


def test_a_killed_maker_is_followed_by_the_one_that_waits(makers):
    for name in ("first", "second"):
        makers.start(name)
    for name in ("first", "second"):
        makers.await_sign(f"ready-{name}")
    makers.go("first")
    makers.await_sign("making")
    makers.go("second")
    makers.await_sign("waiting-second")
    assert makers.processes["second"].poll() is None and makers.makes() == ["first"]
    makers.processes["first"].send_signal(signal.SIGKILL)
    assert makers.processes["first"].wait() == -signal.SIGKILL
    makers.release()  # the one killed can no longer have read it
    assert makers.processes["second"].wait(timeout=60) == 0
    assert makers.makes() == ["first", "second"]


def test_once_makes_nothing_that_is_done_and_lets_go_when_the_maker_raises(tmp_path):
    made = []

    def fails():
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        checkpoint.once(tmp_path / "x", lambda: bool(made), fails, pytest.fail)
    for _ in range(2):
        checkpoint.once(tmp_path / "x", lambda: bool(made), lambda: made.append(1), pytest.fail)
    assert made == [1]


# ---- provenance, schedules, settings


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def test_content_hash_changes_with_any_value_and_not_with_the_order_of_keys():
    value = {"lr": 0.1, "epochs": 3, "name": "a", "flag": True, "deep": {"list": [1, 2.5, None]}}
    digest = content_hash(value)
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert content_hash(dict(reversed(value.items()))) == digest
    digests = {digest}
    for path in leaves(value):
        changed = json.loads(json.dumps(value))
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = "changed"
        digests.add(content_hash(changed))
    digests.add(content_hash(value | {"more": None}))
    digests.add(content_hash(value | {"epochs": 3.0000001}))
    digests.add(content_hash(value | {"epochs": "3"}))
    digests.add(content_hash(value | {"deep": {"list": [2.5, 1, None]}}))
    assert len(digests) == 1 + 7 + 4


@pytest.mark.parametrize(
    "name, expected",
    [
        ("constant", [1, 1, 1, 1]),
        ("ramp", [0, 0.25, 0.5, 1]),
        ("cosine", [0, 0.5 - math.sqrt(0.5) / 2, 0.5, 1]),
    ],
)
def test_lambda_schedules_at_known_points(name, expected):
    strength = schedule.LAMBDA_SCHEDULES[name]
    assert [strength(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected)
    assert set(schedule.LAMBDA_SCHEDULES) == {"constant", "ramp", "cosine"}


def test_learning_rate_is_half_a_cosine_from_1_to_0():
    assert [schedule.cosine_lr(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    assert schedule.cosine_lr(0.25) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


def test_learning_rate_warms_up_linearly_and_then_falls():
    at = [schedule.cosine_lr(p, warmup=0.2) for p in (0.0, 0.05, 0.1, 0.2, 0.6, 1.0)]
    assert at == pytest.approx([0, 0.25, 0.5, 1, 0.5, 0])


GOOD = {
    "seed": 0,
    "epochs": 20,
    "warmup_epochs": 5,
    "batch_size": 64,
    "eval_batch_size": 512,
    "device": "cpu",
    "precision": "fp32",
    "compile": False,
    "kernels": "auto",
    "threads": None,
    "objective": "val_acc",
    "pretrained": "auto",
    "pretrain_epochs": None,
    "calibration_batches": 16,
    "bn_batches": 16,
    "level_pictures": 512,
    "histogram_every": 10,
    "cache_dir": "/tmp",
    "resume": False,
}


def test_settings_take_the_least_of_everything_and_the_groups_beside():
    top = GOOD | LEAST | {"model": {"name": "x"}}
    settings = Settings.of(top, ("model", "dataset"))
    assert all(getattr(settings, key) == value for key, value in (GOOD | LEAST).items())


@pytest.mark.parametrize("key, near", [("epoch", "epochs"), ("batchsize", "batch_size"), ("modle", "model")])
def test_an_unknown_key_is_refused_with_the_key_that_was_meant(key, near):
    with pytest.raises(ValueError, match=rf"^{key} is no key.*Did you mean {near}\?"):
        Settings.of(GOOD | {key: 3}, ("model", "dataset"))


def test_an_unknown_key_like_no_other_is_refused_with_all_keys():
    with pytest.raises(ValueError, match=r"zzz is no key.*seed, epochs.*model, dataset"):
        Settings.of(GOOD | {"zzz": 3}, ("model", "dataset"))


BAD_NUMBERS = [(key, value) for key, low in LEAST.items() for value in (low - 1, 1.5, "3", True, [3])]
BAD_NUMBERS += [(key, None) for key in LEAST if key not in ("pretrain_epochs", "threads", "eval_batch_size")]
BAD_NUMBERS += [("seed", 2**31)]
BAD_WORDS = [("precision", "fp16"), ("precision", None), ("objective", "test_acc"), ("objective", 1)]
BAD_WORDS += [(key, value) for key in ("device", "pretrained", "cache_dir") for value in (None, 3, True)]
BAD_WORDS += [(key, value) for key in ("resume", "compile") for value in (None, 0, "false")]
BAD_WORDS += [("kernels", value) for value in (None, "triton", True)]


@pytest.mark.parametrize("key, value", BAD_NUMBERS + BAD_WORDS)
def test_each_bad_value_is_refused_with_its_key(key, value):
    with pytest.raises(ValueError, match=rf"^{key}="):
        Settings(**(GOOD | {key: value}))


def test_float_epochs_follow_pretrain_epochs_then_epochs_then_the_default_for_ptq():
    def epochs(**changed):
        return Settings(**(GOOD | changed)).float_epochs

    assert (epochs(), epochs(pretrain_epochs=7), epochs(epochs=0), epochs(epochs=0, pretrain_epochs=3)) == (
        20,
        7,
        20,
        3,
    )
    assert epochs(epochs=33) == 33


def test_a_device_that_is_not_there_is_refused():
    with claimed_device("cpu") as device:
        assert device == torch.device("cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device={name} cannot be used"), claimed_device(name):
            pass
