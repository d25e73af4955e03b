"""python -m multirun_analysis PATH... [--out FOLDER]: run folders -> runs.csv, table.md, figures/*.png."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from . import plots, tables
from .load import gathered, load_runs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m multirun_analysis", description="Run folders -> tables, figures.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run folders, or any folder above them")
    parser.add_argument("--out", type=Path, help="where to write (default: report/ in the first PATH)")
    args = parser.parse_args(argv)
    for path in args.paths:
        if not path.is_dir():
            parser.error(f"{path} is not a folder")

    runs = load_runs(args.paths)
    for problem in gathered(runs.problems):
        print(problem, file=sys.stderr)
    if runs.frame.empty:
        print(
            f"no run (summary.json, .hydra/config.yaml) below {', '.join(map(str, args.paths))}",
            file=sys.stderr,
        )
        return 1

    out = args.out or args.paths[0] / "report"
    (out / "figures").mkdir(parents=True, exist_ok=True)
    tables.runs_table(runs.frame).to_csv(out / "runs.csv", index=False)
    text = f"{tables.to_markdown(tables.settings_table(runs.frame))}\n\n{tables.footer(runs)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    for name, draw in figures(runs.frame):
        try:
            draw().savefig(out / "figures" / f"{name}.png")
        except ValueError as problem:  # one figure without its data must not cost the others
            print(f"no figure {name}: {problem}", file=sys.stderr)
    print(f"wrote {out}", file=sys.stderr)
    return 0


def figures(frame: pd.DataFrame) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and drawing of each figure: all runs as curves, and one run of each setting from within.

    That one is the completed run with the lowest seed, a choice that does not look at how it went.
    """
    keys, groups = tables.varying(frame), tables.groups(frame)
    names = [
        ", ".join(
            f"{key.removeprefix('config.')}={tables.show(value)}" for key, value in zip(keys, values, strict=True)
        )
        for values, _ in groups
    ]
    at_once = len(plots.LINES)
    for start in range(0, len(groups), at_once):
        part = zip(names[start : start + at_once], groups[start : start + at_once], strict=True)
        lines = [(Path(path), name or "all runs") for name, (_, runs) in part for path in runs["path"]]
        number = f"_{start // at_once + 1}" if len(groups) > at_once else ""
        yield f"learning_curves{number}", lambda lines=lines: plots.learning_curves(*zip(*lines, strict=True))
    root = os.path.commonpath([os.path.abspath(Path(path).parent) for path in frame["path"]])
    for _, runs in groups:
        folder = Path(min(runs.to_dict("records"), key=_shown_first)["path"])
        name = os.path.relpath(os.path.abspath(folder), root).replace(os.sep, "__")
        yield f"level_histograms_{name}", lambda folder=folder: plots.level_histograms(folder)
        yield f"levels_over_epochs_{name}", lambda folder=folder: plots.levels_over_epochs(folder)


def _shown_first(run: dict) -> tuple:
    seed = run.get(tables.SEED)
    return run["status"] != "completed", not isinstance(seed, int), seed if isinstance(seed, int) else 0


if __name__ == "__main__":
    sys.exit(main())
