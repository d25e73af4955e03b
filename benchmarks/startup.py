"""How long brqat takes to start: to its help, to the first training step, and between the runs of a multirun.

    python benchmarks/startup.py                              # of the brqat beside it; three minutes on two cores
    python benchmarks/startup.py --repeats 5 --json           # one JSON object instead of the tables
    python benchmarks/startup.py --of ../older . --repeats 5  # several checkouts, which take turns

a  Seconds of whole commands that train nothing: --help, --cfg job.
b  Seconds from the start of the process to the end of the first step of quantized training (digits, threads=1, the
   float baseline cached), and where they went (benchmarks/first_step.py).
c  Seconds of a further run in one process (brqat -m seed=0,1,...) outside its training, which is the `seconds` of its
   summary: its epochs, without data, calibration and the test.

Each figure is a process of its own: after one round that fills the caches, rounds in which every measurement of every
checkout has its turn, the order of checkouts reversed between rounds. Medians, in brackets the lowest and the highest.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMANDS = {
    "brqat --help": ["--help"],
    "brqat --cfg job": ["--cfg", "job"],
    "brqat-study --help": ["--help"],
    "brqat-report --help": ["--help"],
}
TRACKINGS = ("files", "wandb")
ALL = "in all"  # of b, by a process in which nothing else is looked at
SEEDS = 4  # of the multirun of c; the first run of a process is not a further one
CALL = "import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"  # pip's scripts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (3)")
    parser.add_argument("--part", nargs="+", choices="abc", default=["a", "b", "c"])
    parser.add_argument(
        "--of", nargs="+", type=Path, default=[HERE.parent], metavar="FOLDER", help="checkouts of brqat"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error("--repeats takes 1 or more")
    checkouts = [folder.resolve() for folder in given.of]
    with tempfile.TemporaryDirectory(prefix="brqat-startup-") as place:
        found = measured([Checkout(folder, Path(place) / str(i)) for i, folder in enumerate(checkouts)], given)
    if given.json:
        print(json.dumps({"machine": machine(), "checkouts": found}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for title, rows in tables(found).items():
        print(f"\n## {title}\n\n" + markdown(rows))


def measured(checkouts: list["Checkout"], given: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Checkout -> figure -> median, low, high and n, in seconds."""
    seconds: dict[str, dict[str, list[float]]] = {one.name: {} for one in checkouts}
    for repeat in range(-1, given.repeats):  # -1 fills the caches: bytecode, the float baselines, the disk's
        for measure in measurements(given.part):
            for one in checkouts if repeat % 2 == 0 else reversed(checkouts):
                for figure, values in measure(one).items():
                    if repeat >= 0:
                        seconds[one.name].setdefault(figure, []).extend(values)
    return {name: {figure: summary(values) for figure, values in of.items()} for name, of in seconds.items()}


def measurements(parts: list[str]) -> list[Callable[["Checkout"], dict[str, list[float]]]]:
    found = []
    if "a" in parts:
        found += [lambda one, title=title: {title: [one.seconds_of(title)]} for title in COMMANDS]
    for tracking in TRACKINGS:
        if "b" in parts:
            found.append(lambda one, t=tracking: {f"{ALL}, {t}": [one.launched("step", t)["first_step"]]})
            found.append(lambda one, t=tracking: phases(one.launched("phases", t)["phases"], t))
        if "c" in parts:
            found.append(lambda one, t=tracking: {f"further run, {t}": further(one.launched("runs", t)["runs"])})
    return found


def phases(seconds: dict[str, float], tracking: str) -> dict[str, list[float]]:
    return {f"{phase}, {tracking}": [value] for phase, value in seconds.items()}


def further(runs: list[dict]) -> list[float]:
    """Seconds from the end of one run to the end of the next that were not its training."""
    return [after["ended"] - before["ended"] - after["trained"] for before, after in itertools.pairwise(runs)]


class Checkout:
    """A folder that holds brqat, and what its commands are."""

    def __init__(self, folder: Path, place: Path):
        self.folder, self.place, self.count = folder, place, 0
        self.name = str(folder) if folder != HERE.parent else "."
        self.environment = os.environ | {
            "PYTHONPATH": str(folder),
            "BRQAT_CACHE": str(place / "cache"),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }
        place.mkdir()
        where = self._python("-c", "import brqat; print(brqat.__file__)").strip()
        if Path(where).parent.parent != folder:
            raise SystemExit(f"{folder} holds no brqat: {where} would be measured.")
        # Not the installed scripts, which are those of another checkout.
        self.scripts = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["scripts"]

    def seconds_of(self, title: str) -> float:
        name = title.split()[0]
        module, _, function = self.scripts[name].partition(":")
        call = CALL.format(module=module, function=function, name=name)
        began = time.monotonic()
        self._python("-c", call, *COMMANDS[title])
        return time.monotonic() - began

    def launched(self, mode: str, tracking: str) -> dict:
        """What first_step.py found."""
        self.count += 1
        out, folder = self.place / f"{self.count}.json", self.place / f"run{self.count}"
        words = ["epochs=2", "warmup_epochs=1", "threads=1", f"tracking={tracking}", f"hydra.run.dir={folder}"]
        if mode == "runs":
            words += ["-m", f"seed={','.join(map(str, range(SEEDS)))}", f"hydra.sweep.dir={folder}"]
        if not (self.place / "cache").exists():  # the baseline of seed 0; those of c are trained in the first round
            self._python(str(HERE / "first_step.py"), str(out), "step", self.scripts["brqat"], *words)
            return self.launched(mode, tracking)
        self._python(str(HERE / "first_step.py"), str(out), mode, self.scripts["brqat"], *words)
        return json.loads(out.read_text())

    def _python(self, *words: str) -> str:
        started = {"BRQAT_STARTED": repr(time.monotonic())}
        command = [sys.executable, *words]
        # Not in the checkout, which would be imported from there whatever PYTHONPATH says.
        done = subprocess.run(command, cwd=self.place, env=self.environment | started, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout


# ---- what is said of the figures


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def machine() -> dict[str, str | int]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.partition(":")[2].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": date.today().isoformat(),
    }


def tables(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, list[list[str]]]:
    """Title -> rows, of which the first is the header; a column for each checkout."""
    figures = list(dict.fromkeys(figure for of in found.values() for figure in of))
    whole = {"a. Commands that train nothing": [f for f in figures if f in COMMANDS]}
    for tracking in TRACKINGS:
        mine = [f for f in figures if f.endswith(f", {tracking}")]
        further = [f for f in mine if f.startswith("further run")]
        whole[f"b. To the first step, tracking={tracking}"] = [f for f in mine if f not in further]
        whole[f"c. A further run outside its training, tracking={tracking}"] = further
    head = ["seconds", *found]
    said_of = {f: [f.rpartition(", ")[0] or f, *(said(of.get(f)) for of in found.values())] for f in figures}
    return {title: [head, *(said_of[f] for f in rows)] for title, rows in whole.items() if rows}


def said(figure: dict[str, float] | None) -> str:
    return f"{figure['median']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}] (n={figure['n']})" if figure else "-"


def markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
