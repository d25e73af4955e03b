"""The report: one page that opens without a network, from the answer in words down to every run."""

import html
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import quote

import pandas as pd
from plotly.offline import get_plotlyjs

from . import plots, screen, tables
from .answers import Answer, answers, best_of, levels_words, missing, setting_text, widths
from .chart import Chart
from .load import Runs, is_number
from .stats import FIGURES, SEED
from .study import Study

PAGE = Path(__file__).parent / "page"
MOST_OPEN = 6  # panels of a chart, beyond which the page has them folded
PRINTED_LAYERS = 4  # in a histogram on paper; the screen has all
RUN_FIGURES = ("test_acc", "val_acc", "float_test_acc", "best_epoch", "seconds")


class Planned(NamedTuple):
    """A chart that the report may have."""

    section: str
    name: str  # of its files
    make: Callable[[], Chart]  # raises ValueError where its data are not there
    on_paper: Callable[[], Chart] | None = None  # where print holds less


def planned(table: pd.DataFrame, studies: Sequence[Study]) -> Iterator[Planned]:
    """All charts, in the order of the page, each under a name of its own."""
    names: dict[str, int] = {}
    for plan in _planned(table, studies):
        again = names[plan.name] = names.get(plan.name, 0) + 1
        yield plan if again == 1 else plan._replace(name=f"{plan.name}_again{again}")


def _planned(table: pd.DataFrame, studies: Sequence[Study]) -> Iterator[Planned]:
    yield Planned("Accuracy", "accuracy_against_lambda", partial(plots.accuracy_against_lambda, table))
    yield Planned("Accuracy", "pareto", partial(plots.pareto, table))
    for bits in widths(table):
        best = best_of(table, bits, regularized=True)  # what it did to the levels is the question
        if best is None:
            continue
        section, row = f"Levels at {bits}", table.loc[best].to_dict()
        runs = _by_policy(table, bits)
        for kind in ("weight", "act"):
            width = row[f"{kind}_bits"]
            if is_number(width) and width <= 8:
                make = partial(plots.levels_over_epochs, runs, kind, width, bits)
                yield Planned(section, f"levels_{kind}_{plots.safe(bits)}", make)
        if row["paths"]:
            folder, name = Path(row["paths"][0]), f"{bits}, {setting_text(row)}, {_seed(row)}"
            yield Planned(
                section, f"effectiveness_map_{plots.safe(bits)}", partial(plots.effectiveness_map, folder, name)
            )
            histograms = partial(plots.level_histograms, folder, name)
            few = partial(plots.level_histograms, folder, name, PRINTED_LAYERS)
            yield Planned(section, f"level_histograms_{plots.safe(bits)}", histograms, few)
    for number, runs in enumerate(_curves(table)):
        name = "learning_curves" if number == 0 else f"learning_curves_{number + 1}"
        yield Planned("Training", name, partial(plots.learning_curves, runs))
    for number, study in enumerate(studies):
        again = sum(other.name == study.name for other in studies[:number])  # two files may hold one name
        for make in plots.OF_STUDIES:
            name = f"{make.__name__}_{plots.safe(study.name)}{f'_{again + 1}' if again else ''}"
            title = f"Study {study.name}{f' in {study.where}' if again else ''}"
            yield Planned(title, name, partial(make, study))


def what_br_did(table: pd.DataFrame) -> dict[str, str]:
    """Bit-width -> a sentence on the levels of weights, where runs have them and something is regularized."""
    found = {}
    for bits in widths(table):
        best = best_of(table, bits, regularized=True)
        row = {} if best is None else table.loc[best].to_dict()
        known = row and all(is_number(row[key]) for key in ("weight_bits", "lambda_br", "lambda_br_act"))
        if not known or row["is_control"] or not row["paths"]:
            continue
        folders = [Path(path) for path in row["paths"]]
        warmup = plots.warmup_epochs(folders[0])
        before = plots.levels_at(folders, "weight", row["weight_bits"], warmup)
        after = plots.levels_at(folders, "weight", row["weight_bits"])
        control = {}
        if row["control"] is not None:
            paths = [Path(path) for path in table.loc[row["control"], "paths"]]
            control = plots.levels_at(paths, "weight", row["weight_bits"])
        if "effectiveness" in before and "effectiveness" in after:
            beside = control if "effectiveness" in control else None
            found[bits] = levels_words(_strength(row), before, after, beside)
    return found


def _seed(row: dict) -> str:
    return f"seed {tables.show(row['seeds'][0])}" if row["seeds"] else "no seed"


def _by_policy(table: pd.DataFrame, bits: str) -> dict[str, list[Path]]:
    """Name -> runs: at a bit-width the best and the strongest setting of each alpha policy, and their controls."""
    of_width = table[(table["bits"] == bits) & (table["val_acc_n"] > 0)]
    found, controls = {}, {}
    for policy in sorted(of_width["policy"].dropna().unique()) or [None]:
        rows = of_width if policy is None else of_width[of_width["policy"] == policy]
        row = table.loc[best_of(rows, bits, regularized=True)]
        # The best may be the weakest of all: what BR can do shows the strongest.
        strongest = max(rows.to_dict("records"), key=lambda one: (one["lambda_br"] or 0, one["lambda_br_act"] or 0))
        for one in (row, strongest):
            found.setdefault(f"{policy or 'all'}, {_strength(one)}", [Path(path) for path in one["paths"]])
        if row["control"] is not None:
            control = table.loc[row["control"]]
            controls[f"{control['policy'] or 'all'}, lambda 0"] = [Path(path) for path in control["paths"]]
    for name, paths in controls.items():
        if len(found) < plots.MAX_LINES and paths:
            found.setdefault(name, paths)
    return dict(list(found.items())[: plots.MAX_LINES])


def _strength(row: dict | pd.Series) -> str:
    """lambda 10, or where activations are regularized too, lambda 10 and .1."""
    act = row["lambda_br_act"]
    return f"lambda {tables.show(row['lambda_br'])}" + (f" and {tables.show(act)}" if act else "")


def _curves(table: pd.DataFrame) -> list[dict[str, list[Path]]]:
    """The best regularized setting of each bit-width and its control, so many to a chart as can be told apart."""
    lines: dict[str, list[Path]] = {}
    for bits in widths(table):
        best = best_of(table, bits, regularized=True)
        if best is None:
            continue
        row = table.loc[best]
        lines[f"{bits}, {_strength(row)}"] = [Path(path) for path in row["paths"]]
        if row["control"] is not None:
            lines[f"{bits}, lambda 0"] = [Path(path) for path in table.loc[row["control"], "paths"]]
    names = list(lines)
    at_once = plots.MAX_LINES
    return [{name: lines[name] for name in names[at:][:at_once]} for at in range(0, len(names), at_once)]


# ---- the page


class Shown(NamedTuple):
    """A chart of the page, and the files that hold it for print."""

    section: str
    chart: Chart
    files: list[str]


def page(
    runs: Runs,
    table: pd.DataFrame,
    keys: Sequence[str],
    studies: Sequence[Study],
    charts: Sequence[Shown],
    notes: Sequence[str],
    out: Path,
    on_levels: dict[str, str],
) -> str:
    """The whole page. Paths in it are relative to out."""
    found, lacks = answers(table), missing(runs, table, studies)
    figures, parts, named, section = [], [], [], None
    for shown in charts:
        if shown.section != section:
            anchor = f"part-{len(named)}"
            named.append(f'<a href="#{anchor}">{_text(shown.section)}</a>')
            parts.append(f"{'</section>' if section else ''}<section id={anchor}><h2>{_text(shown.section)}</h2>")
            section = shown.section
        parts.append(_chart(shown, figures))
    counted = {path for paths in table["paths"] for path in paths} if len(table) else set()
    data = {"settings": _settings(table), "runs": _runs(runs.frame, keys, out, counted), "figures": figures}
    return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        title=_text(f"{len(runs.frame)} runs: {tables.counted(runs.frame['status'])}"),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        answers="".join(_answer(answer, on_levels.get(answer.bits)) for answer in found)
        or "<p>No run has completed: there is no answer yet.</p>",
        missing=_list(lacks) if lacks else "<p>Nothing that this report looks for.</p>",
        parts=" ".join(named),
        charts="".join(parts) + ("</section>" if section else ""),
        notes=_list(notes),
        provenance=_provenance(runs.frame),
        css=(PAGE / "page.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        script=(PAGE / "page.js").read_text(encoding="utf-8"),
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c"),
    )


def _answer(answer: Answer, on_levels: str | None) -> str:
    return (
        f"<article><h3>{_text(answer.bits)}: {_text(answer.accuracy)}</h3><p><code>{_text(answer.setting)}</code></p>"
        f"{_list([*answer.words, *([on_levels] if on_levels else [])])}</article>"
    )


def _chart(shown: Shown, figures: list[dict]) -> str:
    chart, panels = shown.chart, []
    for panel, figure in zip(chart.panels, screen.drawn(chart), strict=True):
        label = _text(f"{panel.title}. {chart.alt}")
        height = int(figure.layout.height)
        panels.append(
            f'<div class="panel" role="img" aria-label="{label}" data-figure="{len(figures)}" '
            f'style="height:{height}px"></div>'
        )
        figures.append(json.loads(figure.to_json()))
    links = " ".join(f'<a href="{_text(file)}">{file.rpartition(".")[2].upper()}</a>' for file in shown.files)
    caption = f"<figcaption>{_text(chart.title)}</figcaption>"
    body = f'<div class="panels" style="--columns:{chart.columns}">{"".join(panels)}</div>'
    if len(panels) > MOST_OPEN:
        body = f"<details><summary>{len(panels)} charts</summary>{body}</details>"
    return f'<figure>{caption}{body}<p class="alt">{_text(chart.alt)} {links}</p></figure>'


def _settings(table: pd.DataFrame) -> dict:
    """The settings table as the page sorts it: {head, rows: [[[text, what to sort by], ...], ...]}."""
    if table.empty:
        return {"head": [], "rows": []}
    head, body = tables.cells(table)
    keys = [name for name in table if name.startswith("config.")]
    rows = []
    for texts, row in zip(body, table.to_dict("records"), strict=True):
        by = [row[name] for name in keys] + [len(row["seeds"])]
        by += [row[f"{name}_mean"] for name in (*FIGURES[:4], "difference", "seconds") if table[f"{name}_n"].any()]
        by += [row[name] for name in ("weight_bytes", "bops") if table[name].notna().any()]
        rows.append([[text, _sorts(value)] for text, value in zip(texts, [*by, row["not_completed"]], strict=True)])
    return {"head": head, "rows": rows}


def _runs(frame: pd.DataFrame, keys: Sequence[str], out: Path, counted: set[str]) -> dict:
    """The runs, one by one, with a link to each folder."""
    config = [name for name in (*keys, SEED) if name in frame]
    figures = [name for name in RUN_FIGURES if name in frame and frame[name].notna().any()]
    ids = [name for name in ("study_name", "trial_number", "wandb_run_id", "config_hash") if name in frame]
    head = ["folder", "status", "in the means", *(name.removeprefix("config.") for name in config), *figures, *ids]
    base = os.path.abspath(out)
    rows = []
    for row in frame.to_dict("records"):
        path = os.path.abspath(row["path"])
        link = quote(os.path.relpath(path, base), errors="surrogateescape") + "/"
        inside = "yes" if row["path"] in counted else "no"
        cells = [[row["path"], row["path"], link], [row["status"], row["status"]], [inside, inside]]
        for name in (*config, *figures, *ids):
            value = row[name]
            percent = name in tables.IN_PERCENT and is_number(value)
            text = f"{100 * value:.2f} %" if percent else tables.show(value)
            cells.append([text if _known(value) else "", _sorts(value)])
        rows.append(cells)
    return {"head": head, "rows": rows}


def _provenance(frame: pd.DataFrame) -> str:
    """What made the runs: code, versions, machines; how many differ."""
    rows = []
    names = [name for name in frame if name.startswith("versions.")]
    for name in ("git_sha", *names, "device", "study_name", "config_hash"):
        if name not in frame:
            continue
        counts = frame[name].dropna().map(tables.show).value_counts()
        shown = ", ".join(f"{value} ({count} runs)" for value, count in list(counts.items())[:5])
        more = f", and {len(counts) - 5} more" if len(counts) > 5 else ""
        if name == "config_hash":
            shown, more = f"{len(counts)} different, over {counts.sum()} runs", ""
        if shown:
            rows.append(f"<tr><th scope=row>{_text(name)}</th><td>{_text(shown + more)}</td></tr>")
    return f"<table class=plain>{''.join(rows)}</table>" if rows else "<p>Not recorded.</p>"


def _sorts(value: object) -> float | str | None:
    if isinstance(value, bool) or not _known(value):
        return tables.show(value) if isinstance(value, bool) else None
    return float(value) if is_number(value) else str(value)


def _known(value: object) -> bool:
    return value is not None and value == value


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _text(text: str) -> str:
    return html.escape(text)
