"""Whole runs in the test's own process: composed as Hydra composes them, read back from the folder they leave."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import brqat.train

REPO = Path(brqat.train.__file__).parent.parent
BASE = (
    "tracking=files",
    "device=cpu",
    "threads=1",
    "epochs=2",
    "warmup_epochs=1",
    "bn_batches=4",
    "calibration_batches=4",
)
# A data set of which an epoch takes milliseconds.
SYNTHETIC = (
    "dataset=synthetic",
    "dataset.images=160",
    "dataset.test_images=40",
    "dataset.image_size=8",
    "batch_size=32",
    "level_pictures=32",
)


def overrides_of(*overrides):
    """BASE and these, where of two for one key the later holds."""
    last = {override.partition("=")[0].lstrip("+"): override for override in (*BASE, *overrides)}
    return list(last.values())


def config(*overrides):
    with initialize_config_dir(brqat.train.config_dir()):
        return compose("train", overrides_of(*overrides))


def train(folder, cache, *overrides):
    """The summary of a run in this process."""
    return brqat.train.run(config(f"cache_dir={cache}", *overrides), folder)


def make(node, **arguments):
    """What a group of the config describes."""
    return instantiate(node, _execution_whitelist_=brqat.train.TARGETS, **arguments)


def no_constant(word):
    raise ValueError(f"{word} is not JSON")


def rows(path):
    """Lines of a jsonl file in strict JSON."""
    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def summary(folder):
    return json.loads((folder / "summary.json").read_text(), parse_constant=no_constant)


def by_site(folder):
    """Site -> its rows, epoch by epoch."""
    found = {}
    for row in rows(folder / "levels.jsonl"):
        found.setdefault(row["site"], []).append(row)
    return found


def timeless(path):
    """The text of a jsonl file, byte for byte but for the key `seconds`."""
    return [json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows(path)]


def same_tensors(left, right):
    """Bit for bit, through nested dicts and lists."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_tensors(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same_tensors, left, right))
    return left == right


def assert_same_run(left, right):
    """Two folders hold the same figures, networks and random states."""
    for name in ("metrics.jsonl", "levels.jsonl"):
        assert timeless(left / name) == timeless(right / name)
    for name, ignored in (("last.pt", {"seconds", "kept"}), ("best.pt", set())):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (left, right))
        assert a.keys() == b.keys()
        for key in a.keys() - ignored:
            assert same_tensors(a[key], b[key]), f"{name} differs in {key}"
    differing = {k for k, v in summary(left).items() if summary(right).get(k, "absent") != v}
    assert differing <= {"seconds", "wandb_run_id"}


def records(folder, run_id):
    """What the .wandb file of an offline run holds, read by wandb itself."""
    (path,) = folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines()]
