"""What a study costs besides its training, against upstream's hydra/sweeper=optuna. Prints tables in markdown.

    python benchmarks/sweep.py                                   # all three parts; half an hour on two cores
    python benchmarks/sweep.py --part a --trials 10 100 --storage sqlite --repeats 1 --json sweep.json

a  Seconds from the start of one job to the start of the next where a job trains nothing (benchmarks/idle.py): the tell,
   the ask, Hydra's composing and launching, the claim. At 10, 100 and 500 trials, over the last 20 trials before.
b  The share of two workers' wall time that is not training, in a study of digits trials whose float baseline is
   trained already. Training is the `seconds` of a run's summary: its epochs, without data, calibration and the test.
c  Where the time of a goes, phase by phase, with the commits of SQLite and PostgreSQL.

Each study is a process of its own on an empty storage. Sides take turns within a repeat and the order is reversed
between repeats; spread over trials is in quartiles, ratios are of one repeat's medians, with the lowest and highest.
CPU seconds are the worker's own, and depend less on what else the machine does.
PostgreSQL is Debian's, started on loopback by tests/postgresql.py; its rows are left out where there is none.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import optuna
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
LATEST = 20  # trials that a figure is the median of
STORAGES = ("sqlite", "journal", "postgresql")
UPSTREAM = ("sqlite", "postgresql")  # a journal is nothing that hydra.sweeper.storage of upstream can name
SEARCHED = (
    "regularizer.lambda_br=tag(log,interval(0.1,100.0))",
    "regularizer.lambda_br_act=tag(log,interval(0.001,10.0))",
)
OURS, THEIRS = "study", "optuna"


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: dict = {}
    with tempfile.TemporaryDirectory(prefix="brqat-benchmark-") as place, databases(given.storage) as storages:
        os.environ["BRQAT_CACHE"] = str(Path(place) / "cache")
        if "a" in given.part:
            found["a"] = overheads(storages, given.trials, given.repeats, Path(place))
            print("\n## a. Seconds per trial without training\n")
            print(overhead_table(found["a"], given.trials), flush=True)
        if "b" in given.part:
            found["b"] = shares(given.trained, given.epochs, given.repeats, Path(place))
            print(f"\n## b. Not spent training: {given.trained} trials of {given.epochs} epochs by two workers\n")
            print(share_table(found["b"]), flush=True)
        if "c" in given.part:
            at = min(100, max(given.trials))
            found["c"] = {kind: parts_of(kind, storage, at, Path(place)) for kind, storage in storages.items()}
            print(f"\n## c. Where a trial's time goes, at {at} trials: milliseconds / CPU milliseconds / commits\n")
            print(parts_table(found["c"]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices="abc", default=["a", "b", "c"])
    parser.add_argument("--trials", nargs="+", type=int, default=[10, 100, 500], metavar="N", help="sizes of a (and c)")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES), help="of a and c")
    parser.add_argument("--repeats", type=int, default=3, help="of a and b")
    parser.add_argument("--trained", type=int, default=10, metavar="N", help="trials of b")
    parser.add_argument("--epochs", type=int, default=20, help="of a trial of b")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    given = parser.parse_args(arguments)
    if min(given.trials) < 2 or given.trained < 2 or given.repeats < 1:
        parser.error("--trials and --trained take 2 or more, --repeats 1 or more")
    return given


# ---- studies in processes of their own


@dataclass
class Databases:
    """Where each new study lives."""

    server: str | None = None  # PostgreSQL's address
    count: int = field(default=0)

    def new(self, kind: str, folder: Path) -> str:
        """hydra.sweeper.storage of an empty storage."""
        if kind != "postgresql":
            return f"{kind}:///{folder}/study.{'db' if kind == 'sqlite' else kind}"
        import postgresql

        self.count += 1
        return postgresql.database(self.server, f"benchmark{self.count}").replace("postgresql:", "postgresql+psycopg:")


@contextlib.contextmanager
def databases(kinds: list[str]) -> Iterator[dict[str, Databases]]:
    """Kind of storage -> where its studies live."""
    found = {kind: Databases() for kind in kinds if kind != "postgresql"}
    if "postgresql" not in kinds:
        yield found
        return
    import pytest

    sys.path.insert(0, str(REPO / "tests"))
    with contextlib.ExitStack() as stack:
        try:
            import postgresql

            found["postgresql"] = Databases(stack.enter_context(postgresql.server(fsync="on")))
        except (ImportError, pytest.skip.Exception) as reason:
            print(f"PostgreSQL is left out: {reason}", flush=True)
        yield found


def words_of(side: str, storage: str, folder: Path, trials: int) -> list[str]:
    """What follows `brqat` on the command line of a study of one side."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["-m", f"hydra/sweeper={side}", *SEARCHED, "tracking=files", "threads=1"]
    words += [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra.job.num}"]
    words += [f"hydra.sweeper.storage='{storage}'", "hydra.sweeper.study_name=benchmark"]
    words += [f"hydra.sweeper.n_trials={trials}", "hydra.sweeper.n_jobs=1"]
    return words if side == OURS else [*words, "hydra.sweeper.direction=maximize"]


def run(program: list[str], words: list[str]) -> None:
    done = subprocess.run([sys.executable, *program, *words], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join([*program, *words])}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def idle(side: str, storage: str, trials: int, folder: Path, *options: str) -> dict:
    """What benchmarks/idle.py measured in a study of so many trials."""
    out = folder.with_suffix(".json")
    words = words_of(side, storage, folder, trials)
    run([str(HERE / "idle.py"), str(out), *options], words)
    return json.loads(out.read_text())


# ---- a


def overheads(storages: dict[str, Databases], trials: list[int], repeats: int, place: Path) -> list[dict]:
    """A row per study: side, storage, repeat, and the seconds between the starts of its jobs, in all and of its CPU."""
    rows = []
    sides = [(OURS, kind) for kind in storages] + [(THEIRS, kind) for kind in storages if kind in UPSTREAM]
    if "journal" in storages and "sqlite" not in storages:
        sides.append((THEIRS, "sqlite"))
    for repeat in range(repeats):
        for side, kind in sides if repeat % 2 == 0 else reversed(sides):
            folder = place / f"a-{side}-{kind}-{repeat}"
            storage = storages.get(kind, Databases()).new(kind, folder)
            measured = idle(side, storage, max(trials), folder)
            row = {"side": side, "storage": kind, "repeat": repeat}
            for name, clock in (("seconds", "began"), ("cpu", "cpu")):
                row[name] = [after - before for before, after in itertools.pairwise(measured[clock])]
            rows.append(row)
    return rows


def overhead_table(rows: list[dict], trials: list[int]) -> str:
    lines = [["sweeper", "storage", "at trial"]]
    for name in ("seconds", "CPU seconds"):
        lines[0] += [f"{name} per trial (quartiles)", "times upstream's (lowest to highest)"]
    for side, kind in dict.fromkeys((row["side"], row["storage"]) for row in rows):
        mine = [row for row in rows if (row["side"], row["storage"]) == (side, kind)]
        base = kind if kind in UPSTREAM else "sqlite"
        theirs = [row for row in rows if (row["side"], row["storage"]) == (THEIRS, base)]
        for at in sorted(trials):
            line = [side, kind, str(at)]
            for key in ("seconds", "cpu"):
                ratios = [
                    median_at(one[key], at) / median_at(other[key], at) for one, other in zip(mine, theirs, strict=True)
                ]
                said = spread(ratios) if side == OURS else "1"
                line.append(quartiles([seconds for one in mine for seconds in window(one[key], at)], 3))
                line.append(said if base == kind else f"{said} of {base}")
            lines.append(line)
    return markdown(lines)


def window(seconds: list[float], at: int) -> list[float]:
    return seconds[max(0, at - LATEST) : at]


def median_at(seconds: list[float], at: int) -> float:
    return statistics.median(window(seconds, at))


# ---- b


def shares(trials: int, epochs: int, repeats: int, place: Path) -> list[dict]:
    """A row per study by two workers: seconds of both together, in all and by what they went for."""
    run(["-m", "brqat.train"], [  # the float baseline
        f"epochs={epochs}", "tracking=files", "threads=1", f"hydra.run.dir={place / 'baseline'}",
    ])  # fmt: skip
    rows = []
    for repeat in range(repeats):
        for side in (OURS, THEIRS) if repeat % 2 == 0 else (THEIRS, OURS):
            rows.append({"side": side, "repeat": repeat} | by_two(side, trials, epochs, place / f"b-{side}-{repeat}"))
    return rows


def by_two(side: str, trials: int, epochs: int, folder: Path) -> dict[str, float]:
    """Upstream's workers cannot share a number of trials, so each gets half."""
    folder.mkdir()
    storage = Databases().new("sqlite", folder)
    if side == THEIRS:  # which does not survive two workers that create the tables at once
        optuna.create_study(study_name="benchmark", storage=storage, direction="maximize")
    numbers = [trials, trials] if side == OURS else [trials // 2, trials - trials // 2]
    folders = [folder / "runs"] * 2 if side == OURS else [folder / "0", folder / "1"]

    def work(number: int, there: Path) -> tuple[float, float]:
        began = time.time()
        run(["-m", "brqat.train"], [*words_of(side, storage, there, number), f"epochs={epochs}"])
        return began, time.time()

    with ThreadPoolExecutor(2) as pool:
        times = list(pool.map(work, numbers, folders))
    rows = optuna.load_study(study_name="benchmark", storage=storage).trials
    assert len(rows) == trials
    assert all(row.state.name == "COMPLETE" for row in rows), [row.state for row in rows]
    found = dict.fromkeys(("wall", "trained", "start", "in trials", "between", "tail"), 0.0)
    for owned, (began, ended) in zip(owners(side, rows, folders), times, strict=True):
        first, last = stamp(owned[0].datetime_start), max(stamp(row.datetime_complete) for row in owned)
        inside = sum(stamp(row.datetime_complete) - stamp(row.datetime_start) for row in owned)
        found["wall"] += ended - began
        found["start"] += first - began
        found["in trials"] += inside
        found["between"] += last - first - inside
        found["tail"] += ended - last
    summaries = [json.loads(file.read_text()) for file in folder.rglob("summary.json")]
    assert len(summaries) == trials
    found["trained"] = sum(summary["seconds"] for summary in summaries)
    return found


def owners(side: str, rows: list[FrozenTrial], folders: list[Path]) -> list[list[FrozenTrial]]:
    """The trials of each worker."""
    if side == OURS:
        of = [row.user_attrs["lease"]["pid"] for row in rows]
        split = [[row for row, owner in zip(rows, of, strict=True) if owner == who] for who in dict.fromkeys(of)]
    else:  # upstream does not note who ran what, but each of its workers has a folder of its own
        split = []
        for folder in folders:
            found = [OmegaConf.load(file).regularizer.lambda_br for file in folder.glob("*/.hydra/config.yaml")]
            split.append([row for row in rows if row.params["regularizer.lambda_br"] in found])
    assert len(split) == 2 and all(split), "one worker had all trials: give more of them, or more epochs"
    return split


def stamp(when: datetime) -> float:
    return when.timestamp()


def share_table(rows: list[dict]) -> str:
    head = ["sweeper", "wall, s", "not training", "the same from the first trial's start", "start", "in trials"]
    lines = [[*head, "between trials", "after the last one"]]
    for side in (OURS, THEIRS):
        mine = [row for row in rows if row["side"] == side]
        line = [side, spread([row["wall"] for row in mine], 1)]
        line.append(spread([100 * (1 - row["trained"] / row["wall"]) for row in mine], 1, " %"))
        line.append(spread([100 * (1 - row["trained"] / (row["wall"] - row["start"])) for row in mine], 1, " %"))
        for key in ("start", "in trials", "between", "tail"):
            of = [row[key] - (row["trained"] if key == "in trials" else 0) for row in mine]
            line.append(spread([100 * seconds / row["wall"] for seconds, row in zip(of, mine, strict=True)], 1, " %"))
        lines.append(line)
    lost = {side: [row["wall"] - row["trained"] for row in rows if row["side"] == side] for side in (OURS, THEIRS)}
    ratios = [ours / theirs for ours, theirs in zip(lost[OURS], lost[THEIRS], strict=True)]
    return markdown(lines) + f"\n\nSeconds not spent training, against upstream's: {spread(ratios)}."


# ---- c


def parts_of(kind: str, storage: Databases, trials: int, place: Path) -> dict[str, dict[str, tuple[float, ...]]]:
    """Side -> phase -> milliseconds, CPU milliseconds and commits of a trial, medians."""
    found = {}
    for side in (OURS, THEIRS) if kind in UPSTREAM else (OURS,):
        there = place / f"c-{side}-{kind}"
        parts = idle(side, storage.new(kind, there), trials, there, "--phases")["phases"][-LATEST:]
        names = dict.fromkeys(name for part in parts for name in part["seconds"])
        found[side] = {
            name: tuple(
                scale * statistics.median(part[measure].get(name, 0) for part in parts)
                for measure, scale in (("seconds", 1000), ("cpu", 1000), ("commits", 1))
            )
            for name in names
        }
        found[side]["together"] = tuple(sum(column) for column in zip(*found[side].values(), strict=True))
    return found


def parts_table(found: dict[str, dict[str, dict[str, tuple[float, ...]]]]) -> str:
    columns = {f"{side}, {kind}": parts for kind, sides in found.items() for side, parts in sides.items()}
    first = next(iter(columns.values()))
    names = sorted(
        dict.fromkeys(name for parts in columns.values() for name in parts),
        key=lambda name: (name == "together", -first.get(name, (0.0,))[0]),
    )
    lines = [["phase", *columns]]
    for name in names:
        cells = [parts.get(name) for parts in columns.values()]
        lines.append([name, *("" if cell is None else "{:.1f} / {:.1f} / {:g}".format(*cell) for cell in cells)])
    return markdown(lines)


# ---- figures as text


def quartiles(values: list[float], digits: int) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def spread(values: list[float], digits: int = 2, unit: str = "") -> str:
    """The median, with the lowest and highest."""
    middle = f"{statistics.median(values):.{digits}f}"
    return f"{middle}{unit} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


if __name__ == "__main__":
    main()
