"""A run that is killed, stopped or broken off goes on as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import REPO, assert_same_run, config, overrides_of, records, rows, summary, train

import brqat.train
from brqat import checkpoint
from brqat.dataset.pixels import Pixels

# Frozen alphas, both penalties, and epochs long enough to be hit.
RUN = (
    "epochs=5",
    "warmup_epochs=2",
    "batch_size=16",
    "model.width=8",
    "alpha_policy=frozen",
    "regularizer.lambda_br_act=0.5",
    "histogram_every=2",
    "optimizer.lr=0.02",
)
PATIENCE_S = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, cache, *RUN)
    return folder


@pytest.fixture
def start():
    """Starts the command line in a folder; what still runs when the test ends is killed."""
    started = []

    def start(folder, cache, *given):
        words = [f"hydra.run.dir={folder}", f"cache_dir={cache}", *overrides_of(*given)]
        process = subprocess.Popen(
            [sys.executable, "-m", "brqat.train", *words],
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_lines(process, path, count):
    """Until a jsonl file has so many lines."""
    until = time.monotonic() + PATIENCE_S
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, f"{path} never had {count} lines"
        time.sleep(0.005)


# ---- killed


@pytest.mark.slow  # four processes, each of which imports torch
@pytest.mark.parametrize("seed", [0, 1])
def test_run_killed_three_times_equals_one_that_was_not(tmp_path, cache, uninterrupted, start, seed):
    draw = random.Random(seed)
    folder = tmp_path / "run"
    for epochs in (1, 2, 3):
        process = start(folder, cache, *RUN, "resume=true")
        wait_for_lines(process, folder / "metrics.jsonl", epochs)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
    process = start(folder, cache, *RUN, "resume=true")
    assert process.wait(PATIENCE_S) == 0, process.communicate()[0]
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize(("name", "epoch"), [("last.pt", 1), ("last.pt", 2), ("last.pt", 3), (".best.next.pt", 3)])
def test_run_broken_off_while_writing_a_checkpoint_equals_one_that_was_not(
    tmp_path, cache, uninterrupted, monkeypatch, name, epoch
):
    """Levels and metrics of the epoch stand in their files already when last.pt is written."""
    save, folder, saved = checkpoint.save, tmp_path / "run", []

    def break_off(path, state):
        if path == folder / name:
            saved.append(state["epoch"])
            if state["epoch"] == epoch and saved.count(epoch) == 1:
                raise OSError("the disk is full")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", break_off)
    with pytest.raises(OSError, match="the disk is full"):
        train(folder, cache, *RUN)
    assert summary(folder)["status"] == "failed" and "disk is full" in summary(folder)["error"]
    if name == "last.pt":
        assert [row["epoch"] for row in rows(folder / "metrics.jsonl")][-1] == epoch
    train(folder, cache, *RUN, "resume=true")
    assert saved.count(epoch) == 2
    assert_same_run(folder, uninterrupted)


def test_run_broken_off_within_an_epoch_equals_one_that_was_not(tmp_path, cache, uninterrupted, monkeypatch):
    epoch, count = Pixels.epoch, []

    def break_off(self, batch_size, seed):
        for number, batch in enumerate(epoch(self, batch_size, seed)):
            if seed == 4 and number == 40 and not count:
                count.append(number)
                raise OSError("the disk is gone")
            yield batch

    monkeypatch.setattr(Pixels, "epoch", break_off)
    with pytest.raises(OSError, match="gone"):
        train(tmp_path / "run", cache, *RUN)
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 3
    train(tmp_path / "run", cache, *RUN, "resume=true")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_run_resumes_from_a_line_that_a_kill_cut_short(tmp_path, cache, uninterrupted, monkeypatch):
    save, folder, failed = checkpoint.save, tmp_path / "run", []

    def break_off(path, state):
        if path == folder / "last.pt" and state["epoch"] == 4 and not failed:
            failed.append(True)
            raise OSError("the disk is full")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", break_off)
    with pytest.raises(OSError):
        train(folder, cache, *RUN)
    for name in ("metrics.jsonl", "levels.jsonl"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-40])
    train(folder, cache, *RUN, "resume=true")
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("policy", ["learnable", "frozen"])
def test_every_optimizer_and_policy_resumes_bit_for_bit(tmp_path, cache, monkeypatch, optimizer, policy):
    given = ("epochs=4", "warmup_epochs=1", f"optimizer={optimizer}", f"alpha_policy={policy}", "pretrained=none")
    given = (*given, "dataset=synthetic", "dataset.images=300", "dataset.augment=crop_flip", "dataset.image_size=8")
    train(tmp_path / "whole", cache, *given)
    save, folder, failed = checkpoint.save, tmp_path / "run", []

    def break_off(path, state):
        if path == folder / "last.pt" and state["epoch"] in (2, 3) and state["epoch"] not in failed:
            failed.append(state["epoch"])
            raise OSError("the disk is full")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", break_off)
    for _ in range(2):
        with pytest.raises(OSError):
            train(folder, cache, *given, "resume=true")
    train(folder, cache, *given, "resume=true")
    assert_same_run(folder, tmp_path / "whole")


# ---- stopped


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_stopped_run_says_so_and_resumes_to_equal_one_that_was_not(tmp_path, cache, uninterrupted, start, number, code):
    folder = tmp_path / "run"
    second = config(f"cache_dir={cache}", *RUN, "resume=true")
    process = start(folder, cache, *RUN)
    wait_for_lines(process, folder / "metrics.jsonl", 1)
    with pytest.raises(ValueError, match="another process is running in"):
        brqat.train.run(second, folder)
    assert process.poll() is None and not (folder / "summary.json").exists()
    process.send_signal(number)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == code, output
    assert "resume=true" in output and "Traceback" not in output
    stopped = summary(folder)
    assert stopped["status"] == "interrupted" and number.name in stopped["error"] and stopped["objective"] == 0
    assert len(rows(folder / "metrics.jsonl")) < 5
    train(folder, cache, *RUN, "resume=true")
    assert_same_run(folder, uninterrupted)


def test_complete_run_is_returned_as_it_is(tmp_path, cache, monkeypatch):
    first = train(tmp_path, cache)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr("brqat.train._run", None)  # nothing is made or trained
    assert train(tmp_path, cache, "resume=true") == first
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_where_a_run_lives_is_no_part_of_its_hash():
    one = brqat.train.config_hash(config(*RUN))
    assert one == brqat.train.config_hash(config(*RUN, "cache_dir=/elsewhere", "tracking=wandb", "resume=true"))
    assert one != brqat.train.config_hash(config(*RUN, "seed=1"))


def test_resumed_run_keeps_its_wandb_id_and_replays_its_past(tmp_path, cache, monkeypatch):
    save, folder, failed = checkpoint.save, tmp_path / "run", []

    def break_off(path, state):
        if path == folder / "last.pt" and state["epoch"] == 2 and not failed:
            failed.append(True)
            raise OSError("the disk is full")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", break_off)
    given = ("epochs=3", "tracking=wandb")
    with pytest.raises(OSError):
        train(folder, cache, *given)
    first = summary(folder)["wandb_run_id"]
    assert train(folder, cache, *given, "resume=true")["wandb_run_id"] == first
    (path,) = folder.glob("wandb/offline-run-*")
    history = [r["history"]["item"]["epoch"] for r in records(folder, first) if r["type"] == "history"]
    assert history == [1, 2, 3] and path.name.endswith(first)
    assert len(list(folder.glob("wandb/superseded/*"))) == 1


# ---- the float baseline


@pytest.mark.slow
def test_two_processes_that_want_one_baseline_train_it_once(tmp_path, start):
    given = ("epochs=2", "pretrain_epochs=6", "model.width=8")
    both = [start(tmp_path / name, tmp_path / "cache", *given) for name in ("a", "b")]
    output = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert sum(text.count("training the float baseline, once") for text in output) == 1
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_baseline_of_a_killed_trainer_is_gone_on_with(tmp_path, cache, uninterrupted, start):
    process = start(tmp_path / "killed", tmp_path / "cache", *RUN)
    until = time.monotonic() + PATIENCE_S
    while not (found := list((tmp_path / "cache").glob("float/*/metrics.jsonl"))):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    wait_for_lines(process, found[0], 2)
    process.kill()
    process.wait()
    folder = found[0].parent
    assert (folder / "last.pt").exists() and not (folder / "summary.json").exists()
    done = {row["epoch"]: row["seconds"] for row in rows(folder / "metrics.jsonl")[:1]}
    train(tmp_path / "next", tmp_path / "cache", *RUN)
    stored = rows(folder / "metrics.jsonl")
    assert [row["epoch"] for row in stored] == [1, 2, 3, 4, 5]
    assert stored[0]["seconds"] == done[1]  # the epoch that was trained is not trained again
    assert_same_run(tmp_path / "next", uninterrupted)
    assert_same_run(folder, cache / "float" / folder.name)


def test_resumed_run_takes_the_threads_it_began_with(tmp_path, cache, monkeypatch):
    """The number of threads orders the sums of a CPU; a machine with more cores must not change the figures."""
    save = checkpoint.save

    def break_off(path, state):
        if path == tmp_path / "last.pt" and state["epoch"] == 2:
            raise OSError("the disk is full")
        save(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", break_off)
        with pytest.raises(OSError, match="the disk is full"):
            train(tmp_path, cache, "epochs=2", "threads=null")
    torch.set_num_threads(2)
    try:
        done = train(tmp_path, cache, "epochs=2", "threads=null", "resume=true")
        assert torch.get_num_threads() == done["threads"] == 1
    finally:
        torch.set_num_threads(1)
