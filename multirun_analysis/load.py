"""Run folders -> one pandas frame, and the list of everything that could not be read.

A run is a folder that holds summary.json (it ended) or only .hydra/config.yaml (it did not). In the frame
the settings are columns `config.KEY`, because a config and a summary share names (`objective` is a word
in the one and a number in the other); the summary's keys stand bare.
"""

import json
import math
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml

CONFIG, SUMMARY = Path(".hydra/config.yaml"), Path("summary.json")
LINE_KEYS = {"metrics.jsonl": ["epoch"], "levels.jsonl": ["epoch", "site"]}  # what a line is about
NOT_SETTINGS = {"wandb", "tracking", "trial", "hydra", "resume", "cache_dir"}  # where a run is kept, not what it is


class Unreadable(ValueError):
    """A file that is missing, empty or damaged; the message says which and why."""


class Runs(NamedTuple):
    frame: pd.DataFrame  # one row per run
    problems: list[str]  # "PATH: what is wrong with it"


class Lines(NamedTuple):
    frame: pd.DataFrame  # one row per line that could be read
    problems: list[str]


class Histogram(NamedTuple):
    edges: np.ndarray  # (num_bars + 1,), in units of v/alpha
    counts: dict[int, np.ndarray]  # epoch -> (num_bars,)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Every run at or below the paths, each once, in the order a person counts: 2 before 10."""
    found = {}
    for path in paths:
        for folder, subfolders, files in os.walk(path):
            run = Path(folder)
            if SUMMARY.name in files or (run / CONFIG).is_file():
                found.setdefault(run.resolve(), run)
            subfolders[:] = [name for name in subfolders if name != "wandb" and not name.startswith(".")]
    return sorted(found.values(), key=_natural)


def load_runs(paths: Iterable[str | Path]) -> Runs:
    """Read every run below the paths. What is damaged is named in `problems`, what is intact is kept."""
    rows, problems = [], []
    for folder in find_runs(paths):
        row = {"path": str(folder), "status": "unfinished"}
        try:
            row |= {f"config.{key}": value for key, value in read_config(folder).items()}
        except Unreadable as problem:
            problems.append(str(problem))
        try:
            row |= read_summary(folder)
        except Unreadable as problem:
            if (folder / SUMMARY).exists():  # its absence is no damage: the run goes on, or was killed
                row["status"] = "unreadable"
                problems.append(str(problem))
        if row["status"] == "completed":
            problems += [
                f"{folder / SUMMARY}: completed, but {key} is {row.get(key)}: in no mean of {key}"
                for key in ("test_acc", "val_acc")
                if not is_number(row.get(key))
            ]
        for name in LINE_KEYS:
            problems += read_lines(folder / name).problems
        rows.append(row)
    # dtype=object keeps the integer 2 an integer in a column where another run has no value
    return Runs(pd.DataFrame(rows, dtype=object), problems)


def read_config(folder: Path) -> dict:
    """A run's settings, flat: {"quantizer.bits": 2, ...}. Interpolations stay as Hydra recorded them."""
    path = Path(folder) / CONFIG
    try:
        config = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise Unreadable(f"{path}: not YAML ({_first_line(error)})") from error
    if not isinstance(config, dict):
        raise Unreadable(f"{path}: holds no settings")
    return flatten({key: value for key, value in config.items() if key not in NOT_SETTINGS}, null="null")


def read_summary(folder: Path) -> dict:
    """A run's summary, flat. A summary without a status counts as status `unknown`, never as completed."""
    path = Path(folder) / SUMMARY
    try:
        summary = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise Unreadable(f"{path}: not JSON ({error})") from error
    if not isinstance(summary, dict):
        raise Unreadable(f"{path}: holds no summary")
    flat = flatten({key: value for key, value in summary.items() if key != "path"})
    return flat | {"status": flat.get("status") or "unknown"}


def read_lines(path: Path) -> Lines:
    """A .jsonl file as a frame. A run that was killed leaves a truncated line: skipped, and counted.

    A resumed run may write an epoch again: the last line about it is the one that counts.
    """
    path = Path(path)
    try:
        lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    except Unreadable as problem:
        return Lines(pd.DataFrame(), [str(problem)])
    rows, damaged, problems = [], [], []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and is_number(row.get("epoch")):
            rows.append(row)
        else:
            damaged.append(str(number))
    if damaged:
        problems.append(f"{path}: {len(damaged)} of {len(lines)} lines unreadable, skipped: {', '.join(damaged)}")
    frame = pd.DataFrame(rows)
    keys = [key for key in LINE_KEYS.get(path.name, ["epoch"]) if key in frame]
    if keys:
        again = frame.duplicated(keys, keep="last")
        if again.any():
            problems.append(f"{path}: {again.sum()} lines written again later, the last one counts")
        frame = frame[~again].sort_values("epoch", kind="stable", ignore_index=True)
    return Lines(frame, problems)


def read_histograms(folder: Path) -> dict[str, Histogram]:
    """Histograms of v/alpha by site, in the order of the net, from the keys SITE@edges and SITE@EPOCH."""
    path = Path(folder) / "histograms.npz"
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise Unreadable(f"{path}: missing") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Unreadable(f"{path}: not an npz archive ({_first_line(error)})") from error
    histograms = {}
    for name, counts in arrays.items():
        site, _, epoch = name.rpartition("@")
        if epoch == "edges":
            continue
        if f"{site}@edges" not in arrays or not epoch.isdigit():
            raise Unreadable(f"{path}: {name} is not SITE@EPOCH with edges in SITE@edges")
        histograms.setdefault(site, Histogram(arrays[f"{site}@edges"], {})).counts[int(epoch)] = counts
    if not histograms:
        raise Unreadable(f"{path}: holds no histogram")
    return histograms


def flatten(tree: dict, null: object = None, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}. Lists become their JSON text, so that every value can be compared.

    `null` replaces None: a setting that is null differs from a setting that a run does not have.
    """
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, null, f"{prefix}{key}.")
        else:
            value = json.dumps(value, default=str) if isinstance(value, (list, dict)) else value
            flat[f"{prefix}{key}"] = null if value is None else value
    return flat


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise Unreadable(f"{path}: missing") from error
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from error
    if not text.strip():
        raise Unreadable(f"{path}: empty")
    return text


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _natural(path: Path) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def gathered(problems: list[str]) -> list[str]:
    """The problems, where a file that many runs lack is named once with their number."""
    lacking = Counter(Path(p.removesuffix(": missing")).name for p in problems if p.endswith(": missing"))
    many = {name for name, count in lacking.items() if count > 3}
    rest = [p for p in problems if not (p.endswith(": missing") and Path(p.removesuffix(": missing")).name in many)]
    return [f"{name}: missing in {lacking[name]} runs" for name in sorted(many)] + rest
