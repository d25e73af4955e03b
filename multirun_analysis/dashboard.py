"""python -m multirun_analysis.dashboard [--group STUDY] [--online]: a wandb workspace and report of brqat's runs.

Without --online they are two files, workspace.json and report.json, written without network or account: what
wandb-workspaces would send. It has no public way to that, so `_to_model`, on which its save() stands, is called here.
"""

import argparse
import os
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

RUNS_A_CHART = 40  # of which wandb shows 10 unless told; sweep=lambda_bits has 40 trials
WIDTH = 24  # of a report's grid
LAMBDAS = {"weight": "regularizer.lambda_br", "act": "regularizer.lambda_br_act"}
SETTINGS = (
    "quantizer.weight.bits", "quantizer.act.bits", "alpha_policy.weight", "alpha_policy.act", *LAMBDAS.values(),
)  # fmt: skip
# Columns of the table of runs; wandb keeps a setting in an envelope: regularizer.value.lambda_br.
COLUMNS = [
    "summary:val_acc", "summary:test_acc", *("config:" + key.replace(".", ".value.", 1) for key in SETTINGS)
]  # fmt: skip
KINDS = {"weight": "weights", "act": "activations"}
SIDES = {"weight": "weight", "act": "input"}  # how the names of a kind's sites end
# Figures of brqat.metrics and brqat.levels, FIGURE/{mean, worst} over sites; the rates of steps are of weights alone.
LEVELS = (
    "effectiveness/mean", "effectiveness/worst", "effectiveness_nonzero/mean", "clip_fraction/mean", "mse_step/mean",
    "flip_rate/mean", "flip_grid/mean", "dead_bins/mean",
)  # fmt: skip
STEPS = ("flip_rate_step/mean", "oscillation/mean", "oscillation_share/mean")
ALPHA = (
    "alpha_drift/mean", "alpha_path/mean", "alpha_grad_ce/mean", "alpha_grad_br/mean", "alpha_grad_br_upstream/mean",
    "stability_index/worst",
)  # fmt: skip


class Section(NamedTuple):
    name: str
    text: str
    panels: list


def sections() -> list[Section]:
    """What both show, with panels of their own for each caller: a grid moves the panels that it is given."""
    import wandb_workspaces.reports.v2 as wr

    def lines(title: str, *metrics: str, runs: int = RUNS_A_CHART, regex: str | None = None) -> wr.LinePlot:
        return wr.LinePlot(title=title, x="epoch", y=list(metrics), metric_regex=regex, max_runs_to_show=runs)

    def figures(kind: str, *names: str) -> list[wr.LinePlot]:
        return [lines(f"{KINDS[kind]}: {name.replace('/', ', ')}", f"levels/{kind}/{name}") for name in names]

    def against(x: wr.Config | wr.SummaryMetric, y: str, **more) -> wr.ScatterPlot:
        return wr.ScatterPlot(title=f"{x.name}, {y}", x=x, y=wr.SummaryMetric(y), **more)

    def every_site(kind: str, figure: str) -> wr.LinePlot:
        return lines(f"{KINDS[kind]}: {figure}", regex=f"^sites/.*{SIDES[kind]}/{figure}$", runs=1)

    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=key in LAMBDAS.values()) for key in SETTINGS]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("val_acc")))
    return [
        Section(
            "Accuracy and loss",
            "On the validation split, which picks the epoch. The figures of the test set, read once at the end, are in "
            "the table of runs: select on validation.",
            [
                lines("validation accuracy", "val/acc"),
                lines("validation loss", "val/loss"),
                against(wr.SummaryMetric("float_val_acc"), "val_acc"),
                lines("cross-entropy", "train/ce"),
                lines("Bin Regularization of weights", "train/br"),
                lines("Bin Regularization of activations", "train/br_act"),
            ],
        ),
        Section(
            "Lambda",
            "How strong Bin Regularization was, against accuracy and against how tightly values sit on their levels "
            "after the last epoch. A logarithmic axis has no place for lambda 0, the control.",
            [
                against(wr.Config(LAMBDAS[kind]), y.format(kind), log_x=True)
                for y in ("val_acc", "levels/{}/effectiveness/mean")
                for kind in KINDS
            ],
        ),
        Section(
            "Settings",
            "Which settings went with which validation accuracy.",
            [
                wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(w=WIDTH, h=10)),
                wr.ParameterImportancePlot(with_respect_to="val_acc", layout=wr.Layout(w=WIDTH // 2, h=8)),
                against(wr.SummaryMetric("weight_bytes"), "val_acc", layout=wr.Layout(w=WIDTH // 2, h=8)),
                wr.RunComparer(diff_only="split", layout=wr.Layout(w=WIDTH, h=12)),
            ],
        ),
        Section(
            "Levels of weights",
            "How tightly weights sit on their levels. First and last layers at their own width are left out.",
            figures("weight", *LEVELS, *STEPS),
        ),
        Section("Levels of activations", "The same of what enters the layers.", figures("act", *LEVELS)),
        Section(
            "Step sizes",
            "How far alpha went since the end of warmup, and what cross-entropy and the regularizer send to it: "
            "directly and, upstream, from the penalties of later sites. With a stability index above 1 it runs away.",
            [panel for kind in KINDS for panel in figures(kind, *ALPHA)],
        ),
        Section(
            "Sites of one run",
            "Of the first run in the table, layer by layer.",
            [every_site(kind, figure) for kind in KINDS for figure in ("alpha", "effectiveness")],
        ),
    ]


def workspace(entity: str, project: str, group: str | None = None) -> "Workspace":
    """A workspace of the project, best runs first; group: a study's name, or what tracking.group was."""
    import wandb_workspaces.workspaces as ws

    best_first = ws.Ordering(ws.Summary("val_acc"), ascending=False)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=_title(group),
        sections=[ws.Section(name=part.name, panels=part.panels, is_open=True) for part in sections()],
        runset_settings=ws.RunsetSettings(filters=_filter(group), order=[best_first], pinned_columns=list(COLUMNS)),
    )


def report(entity: str, project: str, group: str | None = None) -> "Report":
    """The same as a report, with a sentence to each section."""
    import wandb_workspaces.reports.v2 as wr

    def runs() -> wr.Runset:  # names no project, which would be looked up: it is the report's
        best_first = wr.OrderBy(wr.SummaryMetric("val_acc"), ascending=False)
        return wr.Runset(filters=_filter(group), order=[best_first], pinned_columns=list(COLUMNS))

    blocks = [wr.TableOfContents()]
    for part in sections():
        blocks += [wr.H2(part.name), wr.P(part.text), wr.PanelGrid(runsets=[runs()], panels=part.panels)]
    return wr.Report(entity=entity, project=project, title=_title(group), blocks=blocks, width="fluid")


def _title(group: str | None) -> str:
    """Without symbols, of which a workspace's name takes none, not even =, and as short as a report's must be."""
    letters = ("_" if unicodedata.category(letter)[0] in "SC" else letter for letter in group or "")
    return f"brqat: {''.join(letters)}"[:128] if group else "brqat"


def _filter(group: str | None) -> str:
    """In wandb-workspaces' language, which takes = and < for operators even within quotes: hence the escapes."""
    name = "".join(letter if letter.isalnum() else f"\\U{ord(letter):08x}" for letter in group or "")
    return f"Metric('Group') == '{name}'" if group else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m multirun_analysis.dashboard", description="A wandb workspace and report for brqat's runs."
    )
    parser.add_argument("--entity", help="user or team on wandb (default: with --online, your own)")
    parser.add_argument("--project", default="brqat", help="tracking.project of the runs (default: brqat)")
    parser.add_argument("--group", metavar="STUDY", help="show these runs alone: a study's name, or tracking.group")
    parser.add_argument("--out", type=Path, default=Path("dashboard"), metavar="FOLDER", help="default: dashboard/")
    parser.add_argument("--online", action="store_true", help="save both on wandb instead of writing files")
    args = parser.parse_args(argv)
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        return _refuse(f"the dashboard needs wandb-workspaces ({error}). Run: pip install 'brqat[dashboard]'")
    return _send(args) if args.online else _write(args)


def _write(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.entity or "", args.project, args.group
    for name, make in {"workspace": workspace, "report": report}.items():
        path = args.out / f"{name}.json"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            spec = make(*names)._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)  # as in save()
            temporary.write_text(spec, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        print(f"{name:10} {path}")
    print("To have them on wandb: `wandb login` once, then this command with --online.")
    return 0


def _send(args: argparse.Namespace) -> int:
    import wandb

    try:
        logged_in = wandb.login(prompt=False)
    except wandb.errors.AuthenticationError as error:
        return _refuse(f"wandb did not accept the login: {error}")
    if not logged_in:
        return _refuse("--online needs an account that is logged in. Run `wandb login` once, then this again")
    entity = args.entity or wandb.Api().default_entity
    if not entity:
        return _refuse("this account has no entity of its own. Name a team: --entity TEAM")
    names = entity, args.project, args.group
    # The report first: its save() makes a project that is not there yet.
    for name, made in {"report": report(*names), "workspace": workspace(*names)}.items():
        made.save()
        print(f"{name:10} {made.url}")
    return 0


def _refuse(sentence: str) -> int:
    print(f"{sentence.rstrip('.')}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
