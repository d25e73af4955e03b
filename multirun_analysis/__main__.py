"""python -m multirun_analysis PATH... [--out FOLDER]: run folders -> tables, figures and a report that answers."""

import argparse
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from . import load, paper, report, tables
from .answers import answers, missing
from .stats import keys_of
from .study import read_studies

LINE_EVERY = 1000  # runs read, where there is no terminal for a bar


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 if there is no run, 2 for something that cannot be."""
    parser = argparse.ArgumentParser(prog="brqat-report", description=__doc__.partition(": ")[2])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run folders, or any folder above them")
    parser.add_argument("--out", type=Path, help="where to write (default: report/ in the first PATH)")
    parser.add_argument("--by", nargs="+", metavar="KEY", help="what makes a setting (default: all keys that differ)")
    parser.add_argument(
        "--storage", metavar="URL", help="of studies that no file keeps: postgresql://USER@HOST/DATABASE"
    )
    parser.add_argument("--no-figures", action="store_true", help="tables and the report without figures")
    given = parser.parse_args(argv)
    for path in given.paths:
        if not path.is_dir():
            parser.error(f"{path} is not a folder")
    out = given.out or given.paths[0] / "report"

    found = load.find(given.paths)
    if not found.runs:
        print(f"no run (summary.json, .hydra/config.yaml) below {', '.join(map(str, given.paths))}", file=sys.stderr)
        return 1
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        runs = load.load_runs(found.runs, out / ".cache.sqlite", _tracked)
        keys = keys_of(runs.frame, given.by)
    except (OSError, sqlite3.Error) as error:
        print(f"brqat-report: {out} cannot be written: {error}. Give another with --out.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"brqat-report: {error}", file=sys.stderr)
        return 2
    studies, said = read_studies(found.studies, given.storage)
    runs = runs._replace(problems=runs.problems + said)
    _write(runs, keys, studies, out, with_figures=not given.no_figures)
    return 0


def _write(runs: load.Runs, keys: Sequence[str], studies: list, out: Path, with_figures: bool) -> None:
    for problem in load.gathered(runs.problems):
        print(problem, file=sys.stderr)
    table = tables.settings_table(runs.frame, keys)
    notes = tables.notes(runs, table, keys)
    each = tables.runs_table(runs.frame, keys)
    whole(out / "runs.csv", lambda file: each.to_csv(file, index=False))
    whole(out / "runs.parquet", lambda file: tables.typed(each).to_parquet(file, index=False))
    if len(table):
        text = "\n".join([tables.to_markdown(table), "", *(f"- {note}" for note in notes), ""])
        whole(out / "table.tex", lambda file: file.write_text(tables.to_latex(table, notes), encoding="utf-8"))
    else:
        text = "\n".join(["No setting: no run's config could be read.", *(f"- {note}" for note in notes), ""])
    whole(out / "table.md", lambda file: file.write_text(text, encoding="utf-8"))
    print(text)
    for answer in answers(table):
        print(answer)
    for line in missing(runs, table, studies):
        print(f"missing: {line}")

    charts = list(_charts(table, studies, out)) if with_figures else []
    page = report.page(runs, table, keys, studies, charts, notes, out)
    whole(out / "index.html", lambda file: file.write_text(page, encoding="utf-8"))
    print(f"wrote {out / 'index.html'}", file=sys.stderr)


def _charts(table, studies: list, out: Path) -> Iterator[report.Shown]:
    """Draws what there are data for; one figure without them must not cost the others."""
    planned = list(report.planned(table, studies))
    kept = set()
    for plan in _shown("drawing", planned):
        try:
            chart = plan.make()._replace(name=plan.name)
            printed = (plan.on_paper or plan.make)()._replace(name=plan.name)
            files = paper.save(printed, out / "figures")
        except ValueError as problem:
            print(f"no figure {plan.name}: {problem}", file=sys.stderr)
            continue
        kept |= {file.name for file in files}
        yield report.Shown(plan.section, chart, [os.path.relpath(file, out) for file in files])
    for file in (out / "figures").iterdir():  # of an earlier report, or of one that was killed
        if file.name not in kept and file.suffix in (".png", ".svg", ".tmp"):
            file.unlink()


def whole(file: Path, write: Callable[[Path], object]) -> None:
    """A file that is there whole or not at all."""
    new = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    write(new)
    os.replace(new, file)


def _tracked(folders: list[Path]) -> Iterator[Path]:
    return _shown("reading runs", folders)


def _shown(what: str, things: Sequence) -> Iterator:
    """A bar on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(things, what, console=console, transient=True)
        return
    for number, thing in enumerate(things, 1):
        yield thing
        if number % LINE_EVERY == 0:
            print(f"{what}: {number} of {len(things)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
