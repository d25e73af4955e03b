"""From run folders to what a report leaves: tables, figures, and the page that answers."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import track

from . import load, paper, report, tables
from .answers import answers, missing
from .stats import keys_of
from .study import read_studies

NAMES = ".names"  # of the figures that a report has drawn
LINE_EVERY = 1000  # runs read, where there is no terminal for a bar


def write(paths: Sequence[Path], out: Path, by: Sequence[str] | None, storage: str | None, with_figures: bool) -> int:
    """The exit code of brqat-report, whose options these are."""
    found = load.find(paths)
    if not found.runs:
        print(f"no run (summary.json, .hydra/config.yaml) below {', '.join(map(str, paths))}", file=sys.stderr)
        return 1
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        runs = load.load_runs(found.runs, out / ".cache.sqlite", _tracked)
        keys = keys_of(runs.frame, by)
    except OSError as error:
        print(f"brqat-report: {out} cannot be written: {error}. Give another with --out.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"brqat-report: {error}", file=sys.stderr)
        return 2
    studies, said = read_studies(found.studies, storage)
    runs = runs._replace(problems=said + found.problems + runs.problems)
    try:
        _write(runs, keys, studies, out, with_figures)
    except OSError as error:
        print(f"brqat-report: {out} cannot be written: {error}. Give another with --out.", file=sys.stderr)
        return 2
    return 0


def _write(runs: load.Runs, keys: Sequence[str], studies: list, out: Path, with_figures: bool) -> None:
    table = tables.settings_table(runs.frame, keys)
    notes = tables.notes(runs, table, keys)
    each = tables.runs_table(runs.frame, keys)
    whole(out / "runs.csv", lambda file: each.to_csv(file, index=False))
    whole(out / "runs.parquet", lambda file: tables.typed(each).to_parquet(file, index=False))
    if len(table):
        text = "\n".join([tables.to_markdown(table), "", *(f"- {note}" for note in notes), ""])
        latex = tables.to_latex(table, notes)
        whole(out / "table.tex", lambda file: file.write_text(latex, encoding="utf-8", errors="backslashreplace"))
    else:
        text = "\n".join(["No setting: no run's config could be read.", *(f"- {note}" for note in notes), ""])
    whole(out / "table.md", lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))
    _print(text)
    on_levels = report.what_br_did(table)
    for answer in answers(table):
        _print(f"{answer} {on_levels.get(answer.bits, '')}".rstrip())
    for line in missing(runs, table, studies):
        _print(f"missing: {line}")

    charts, absent = _charts(table, studies, out) if with_figures else ([], [])
    page = report.page(runs, table, keys, studies, charts, [*notes, *absent], out, on_levels)
    whole(out / "index.html", lambda file: file.write_text(page, encoding="utf-8", errors="backslashreplace"))
    print(f"wrote {out / 'index.html'}", file=sys.stderr)


def _charts(table: pd.DataFrame, studies: list, out: Path) -> tuple[list[report.Shown], list[str]]:
    """Draws what there are data for, and says why the rest is not drawn: one figure must not cost the others."""
    shown, absent, listed = [], [], out / "figures" / NAMES
    for plan in _shown("drawing", list(report.planned(table, studies))):
        try:
            chart = plan.make()._replace(name=plan.name)
            printed = (plan.on_paper or plan.make)()._replace(name=plan.name)
            files = paper.save(printed, out / "figures")
        except OSError:
            raise
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            absent.append(f"no figure {plan.name}: {kind}{error}")
            _print(absent[-1], sys.stderr)
            continue
        shown.append(report.Shown(plan.section, chart, [os.path.relpath(file, out) for file in files]))
    names = {Path(file).name for one in shown for file in one.files}
    earlier = listed.read_text(encoding="utf-8", errors="replace").split("\n") if listed.is_file() else []
    for name in set(earlier) - names:  # of a report before this one; what others put here stays
        if name and Path(name).name == name:
            (listed.parent / name).unlink(missing_ok=True)
    whole(listed, lambda file: file.write_text("\n".join(sorted(names)), encoding="utf-8"))
    return shown, absent


def _print(text: str, file=None) -> None:
    """Also where a terminal cannot write a letter."""
    out = file or sys.stdout
    encoding = getattr(out, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=out)


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
