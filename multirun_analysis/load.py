"""Run folders -> one pandas frame, and the list of everything that could not be read.

A run is a folder that holds summary.json (it ended) or only .hydra/config.yaml (it did not). In the frame
the settings are columns `config.KEY`, because a config and a summary share names (`objective` is a word
in the one and a number in the other); the summary's keys stand bare.

What was read of a run is kept in a cache, with size and time of its files: a second call reads only what changed.
"""

import hashlib
import json
import math
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml

CONFIG, SUMMARY = Path(".hydra/config.yaml"), Path("summary.json")
STUDIES = ("study.db", "study.journal")  # what hydra/sweeper=study keeps its trials in
LINE_KEYS = {"metrics.jsonl": ["epoch"], "levels.jsonl": ["epoch", "site"]}  # what a line is about
# Where a run is kept and how it is fed, not what it is.
NOT_SETTINGS = {"wandb", "tracking", "trial", "hydra", "resume", "cache_dir", "dataset.cache_dir", "dataset.workers"}
# Columns that a frame has even where no run came to them.
FIGURES = ("test_acc", "val_acc", "float_test_acc", "seconds", "weight_bits", "act_bits", "weight_bytes", "bops")
COMMIT_EVERY = 100  # runs read: a call that is stopped loses no more, and another need not wait long


class Unreadable(ValueError):
    """A file that is missing, empty or damaged; the message says which and why."""


class Found(NamedTuple):
    runs: list[Path]  # folders
    studies: list[Path]  # files that a study is kept in
    problems: list[str]  # folders that could not be looked into


class Runs(NamedTuple):
    frame: pd.DataFrame  # one row per run
    problems: list[str]  # "PATH: what is wrong with it"


class Lines(NamedTuple):
    frame: pd.DataFrame  # one row per line that could be read
    problems: list[str]


class Histogram(NamedTuple):
    edges: np.ndarray  # (num_bars + 1,), in units of v/alpha
    counts: dict[int, np.ndarray]  # epoch -> (num_bars,)


def find(paths: Iterable[str | Path]) -> Found:
    """Every run and study at or below the paths, each once, in the order a person counts: 2 before 10."""
    runs, studies, seen, problems = {}, {}, set(), []
    for path in paths:
        walk = os.walk(
            path, onerror=lambda error: problems.append(f"{error.filename}: {error.strerror}"), followlinks=True
        )
        for folder, subfolders, files in walk:
            here = Path(folder)
            if (real := os.path.realpath(here)) in seen:  # a link that leads back
                subfolders.clear()
                continue
            seen.add(real)
            if SUMMARY.name in files or (".hydra" in subfolders and (here / CONFIG).is_file()):
                runs.setdefault(real, here)
            for name in STUDIES:
                if name in files:
                    studies.setdefault(os.path.realpath(here / name), here / name)
            subfolders[:] = [name for name in subfolders if name != "wandb" and not name.startswith(".")]
    return Found(sorted(runs.values(), key=_natural), sorted(studies.values(), key=_natural), problems)


def load_runs(folders: Iterable[Path], cache: Path | None = None, track: Callable[[list], Iterable] = iter) -> Runs:
    """Reads the runs in these folders. What is damaged is named in `problems`, what is intact is kept.

    cache: a file for what was read; a damaged one, or one of another version of this code, is begun anew.
    track: goes through the folders, and may show how far it has come.
    """
    rows, problems, same = [], [], {}
    with closing(_Cache(cache)) as known:
        for folder in track(list(folders)):
            row, said = known.get_or_read(folder)
            # Thousands of runs say the same: each value is kept once.
            rows.append({key: same.setdefault((type(value), value), value) for key, value in row.items()})
            problems += said
    keys = dict.fromkeys(["path", "status"]) | dict.fromkeys(key for row in rows for key in row)
    keys |= dict.fromkeys(FIGURES)
    # dtype=object keeps the integer 2 an integer in a column where another run has no value
    return Runs(pd.DataFrame(rows, columns=list(keys), dtype=object), problems)


def read_run(folder: Path) -> tuple[dict, list[str]]:
    """A run's row, and what is wrong with its files. Whatever they hold, it costs this run only."""
    try:
        return _read_run(folder)
    except Exception as error:
        return {"path": str(folder), "status": "unreadable"}, [
            f"{folder}: {type(error).__name__}: {_first_line(error)}"
        ]


def _read_run(folder: Path) -> tuple[dict, list[str]]:
    row, problems = {"path": str(folder), "status": "unfinished"}, []
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
        problems += damage(folder / name)
    return row, problems


class _Cache:
    """Rows by folder in an SQLite file, each with the sizes and times of the files that it was read from.

    It may be deleted at any time. One that cannot be read or written is left alone, and everything is read.
    """

    FILES = (CONFIG, SUMMARY, *map(Path, LINE_KEYS))

    def __init__(self, file: Path | None):
        self.since_commit, self.keeps = 0, True
        self.rows = sqlite3.connect(":memory:")
        if file is not None:
            try:
                self.rows = self._open(file)
                return
            except sqlite3.OperationalError:  # locked by another call, or a disk that takes nothing
                pass
            except sqlite3.DatabaseError:
                with suppress(OSError, sqlite3.Error):
                    file.unlink()
                    self.rows = self._open(file)
                    return
        self._create(self.rows)

    def _open(self, file: Path) -> sqlite3.Connection:
        rows = sqlite3.connect(file, timeout=60, isolation_level=None)
        try:
            rows.execute("BEGIN IMMEDIATE")  # two calls may meet a new file at once
            rows.execute("CREATE TABLE IF NOT EXISTS version (hash TEXT)")
            tables = {name for (name,) in rows.execute("SELECT name FROM sqlite_master")}
            if "runs" not in tables or rows.execute("SELECT hash FROM version").fetchall() != [(self._version(),)]:
                self._create(rows)
            rows.execute("COMMIT")
        except sqlite3.DatabaseError:
            rows.close()
            raise
        rows.isolation_level = ""
        return rows

    def _create(self, rows: sqlite3.Connection) -> None:
        rows.execute("CREATE TABLE IF NOT EXISTS version (hash TEXT)")
        rows.execute("DELETE FROM version")
        rows.execute("DROP TABLE IF EXISTS runs")
        rows.execute("CREATE TABLE runs (folder TEXT PRIMARY KEY, stamp TEXT, row TEXT, problems TEXT)")
        rows.execute("INSERT INTO version VALUES (?)", (self._version(),))

    def _version(self) -> str:
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def get_or_read(self, folder: Path) -> tuple[dict, list[str]]:
        key, stamp = os.fsencode(os.path.abspath(folder)).hex(), self._stamp(folder)
        try:
            found = self.rows.execute("SELECT stamp, row, problems FROM runs WHERE folder = ?", (key,)).fetchone()
            if found and found[0] == stamp:
                return json.loads(found[1]) | {"path": str(folder)}, json.loads(found[2])
        except (sqlite3.Error, ValueError):  # damaged on the way; reading the run is always right
            pass
        row, problems = read_run(folder)
        if self.keeps and stamp == self._stamp(folder):  # else it was written while we read
            self._keep((key, stamp, json.dumps(row), json.dumps(problems)))
        return row, problems

    def _keep(self, values: tuple[str, ...]) -> None:
        try:
            self.rows.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", values)
            self.since_commit += 1
            if self.since_commit % COMMIT_EVERY == 0:
                self.rows.commit()
        except sqlite3.Error:  # a lock that another call holds, a full disk: nothing more is kept
            with suppress(sqlite3.Error):
                self.rows.rollback()
            self.keeps = False

    def _stamp(self, folder: Path) -> str:
        stamps = []
        for name in self.FILES:
            try:
                stat = os.stat(folder / name)
                stamps.append(f"{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}")
            except OSError:
                stamps.append("-")
        return f"{os.fsencode(folder).hex()} {' '.join(stamps)}"  # problems name the folder as it was given

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self.rows.commit()
        self.rows.close()


def read_config(folder: Path) -> dict:
    """A run's settings, flat: {"quantizer.bits": 2, ...}. Interpolations stay as Hydra recorded them."""
    path = Path(folder) / CONFIG
    try:
        config = yaml.load(_text(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise Unreadable(f"{path}: not YAML ({_first_line(error)})") from error
    if not isinstance(config, dict):
        raise Unreadable(f"{path}: holds no settings")
    flat = flatten({key: value for key, value in config.items() if key not in NOT_SETTINGS}, null="null")
    return {key: value for key, value in flat.items() if key not in NOT_SETTINGS}


def read_summary(folder: Path) -> dict:
    """A run's summary, flat. A summary without a status counts as status `unknown`, never as completed."""
    path = Path(folder) / SUMMARY
    try:
        summary = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: not JSON ({_first_line(error)})") from error
    if not isinstance(summary, dict):
        raise Unreadable(f"{path}: holds no summary")
    flat = flatten({key: value for key, value in summary.items() if key not in ("path", "config")})
    texts = {key: str(flat[key]) for key in ("status", "study_name") if flat.get(key) is not None}
    return flat | {"status": "unknown"} | texts


def read_lines(path: Path) -> Lines:
    """A .jsonl file as a frame. A run that was killed leaves a truncated line: skipped, and counted.

    A resumed run may write an epoch again: the last line about it is the one that counts.
    """
    path = Path(path)
    rows, problems = _lines(path)
    keys = LINE_KEYS.get(path.name, ["epoch"])
    last = {tuple(row.get(key) for key in keys): row for row in rows}
    frame = pd.DataFrame(list(last.values()))
    return Lines(frame.sort_values("epoch", kind="stable", ignore_index=True) if len(frame) else frame, problems)


def damage(path: Path) -> list[str]:
    """What is wrong with a .jsonl file."""
    return _lines(path)[1]


def _lines(path: Path) -> tuple[list[dict], list[str]]:
    try:
        lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    except Unreadable as problem:
        return [], [str(problem)]
    rows, damaged, problems = [], [], []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_number(row.get("epoch")) and isinstance(row.get("site", ""), str):
            rows.append(row)
        else:
            damaged.append(str(number))
    if damaged:
        problems.append(f"{path}: {len(damaged)} of {len(lines)} lines unreadable, skipped: {', '.join(damaged)}")
    keys = LINE_KEYS.get(path.name, ["epoch"])
    again = len(rows) - len({tuple(row.get(key) for key in keys) for row in rows})
    if again:
        problems.append(f"{path}: {again} lines written again later, the last one counts")
    return rows, problems


def read_histograms(folder: Path) -> dict[str, Histogram]:
    """Histograms of v/alpha by site, in the order of the net, from the keys SITE@edges and SITE@EPOCH."""
    path = Path(folder) / "histograms.npz"
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise Unreadable(f"{path}: missing") from error
    except Exception as error:  # a damaged archive may raise anything
        raise Unreadable(f"{path}: not an npz archive of arrays ({_first_line(error)})") from error
    histograms = {}
    for name, counts in arrays.items():
        site, _, epoch = name.rpartition("@")
        if epoch == "edges":
            continue
        if f"{site}@edges" not in arrays or not epoch.isdigit():
            raise Unreadable(f"{path}: {name} is not SITE@EPOCH with edges in SITE@edges")
        edges = arrays[f"{site}@edges"]
        if edges.dtype.kind != "f" or counts.dtype.kind not in "iuf" or edges.shape != (len(counts) + 1,):
            raise Unreadable(f"{path}: {name} is no histogram of {len(edges) - 1} bars")
        if not np.isfinite(edges).all():
            raise Unreadable(f"{path}: {site}@edges are not finite")
        histograms.setdefault(site, Histogram(edges, {})).counts[int(epoch)] = counts
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
            flat[printable(f"{prefix}{key}")] = null if value is None else _plain(value)
    return flat


def _plain(value: object) -> str | int | float:
    """A value that every table can hold."""
    if not isinstance(value, (str, int, float)):  # lists, and what YAML takes for a date
        value = json.dumps(value, default=str)
    if isinstance(value, int) and not isinstance(value, bool) and not is_number(value):
        value = str(value)  # more digits than a float can hold
    return printable(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    """Without halves of letters, which a JSON file or a folder's name may hold and no file takes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_number(value: object) -> bool:
    """A finite one that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


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


def gathered(problems: list[str], most: int = 100) -> list[str]:
    """The problems, where a file that many runs lack is named once with their number; not more than `most`."""
    lacking = Counter(Path(p.removesuffix(": missing")).name for p in problems if p.endswith(": missing"))
    many = {name for name, count in lacking.items() if count > 3}
    rest = [p for p in problems if not (p.endswith(": missing") and Path(p.removesuffix(": missing")).name in many)]
    found = [f"{name}: missing in {lacking[name]} runs" for name in sorted(many)] + rest
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]
