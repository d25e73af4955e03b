"""Run folders -> matplotlib figures; nothing here writes a file.

Colours are Okabe and Ito's, which the colour-blind can tell apart; line style or fill says the same again,
so that a grey print reads too. Figures are made without pyplot: no display, no global state, Agg on saving.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .load import Histogram, Unreadable, is_number, read_config, read_histograms, read_lines
from .tables import finite, levels_by_epoch

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
# Neighbours differ in lightness as well as in hue.
LINES = [
    (BLUE, "-"), (ORANGE, "--"), (BLACK, ":"), (VERMILLION, "-."), (SKY, "-"), (GREEN, "--"), (PURPLE, ":"),
]  # fmt: skip
STYLE = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
MAX_ROWS = 4  # layers in a histogram figure
MAX_LEVELS = 16  # beyond that, lines at the levels hide the histogram


@matplotlib.rc_context(STYLE)
def level_histograms(run_folder: Path) -> Figure:
    """Histograms of v/alpha before BR and at the end: weights left, activations right, a layer per row."""
    histograms = read_histograms(run_folder)
    bits = _bits(run_folder)
    layers = _layers(histograms, bits)
    figure = Figure(figsize=(9, 0.9 + 1.7 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), 2, squeeze=False)
    warmup = _warmup_epochs(run_folder)
    for row, layer in zip(grid, layers, strict=True):
        for axes, suffix in zip(row, ("weight", "input"), strict=True):
            site = f"{layer}.{suffix}"
            axes.set_title(f"{site}, {bits[site]} bit" if site in bits else site)
            if site in histograms:
                _draw_histogram(axes, histograms[site], warmup)
                levels = integer_levels(histograms[site].edges, bits.get(site))
                for level in levels if len(levels) <= MAX_LEVELS else ():
                    axes.axvline(level, color=BLACK, linestyle=":", linewidth=0.8, zorder=0)
            else:
                _not_recorded(axes)
        # A ReLU's zeros fill one bar with half of all elements: a linear axis would show nothing else.
        row[1].set_yscale("log")
        row[1].yaxis.set_major_formatter("{x:g}")
        row[0].set_ylabel("elements (%)")
        row[1].set_ylabel("elements (%, log)")
    for axes, name in zip(grid[-1], ("weights", "activations"), strict=True):
        axes.set_xlabel(f"{name}: v / alpha (the outermost bars hold all beyond)")
    _legend(figure, loc="outside lower center", ncols=2)
    figure.suptitle(f"{_name(run_folder)}: do the values gather at the integer levels (dotted)?", x=0.01, ha="left")
    return figure


@matplotlib.rc_context(STYLE)
def learning_curves(run_folders: Sequence[Path], labels: Sequence[str] | None = None) -> Figure:
    """Validation accuracy, cross-entropy and BR over the epochs: a line per run, a colour per label."""
    labels = [Path(folder).name for folder in run_folders] if labels is None else labels
    names = list(dict.fromkeys(labels))
    if len(names) > len(LINES):
        raise ValueError(f"{len(names)} labels in one figure, but only {len(LINES)} lines can be told apart")
    figure = Figure(figsize=(11, 3.6 + 0.2 * len(names)), layout="constrained")
    panels = {
        "val/acc": ("Validation accuracy: higher is better", "val/acc (%)"),
        "train/ce": ("Cross-entropy in training", "train/ce (nats)"),
        "train/br": ("Bin Regularization: falls as weights gather", "train/br (as logged, log scale)"),
    }
    for axes, (key, (title, unit)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for folder, label in zip(run_folders, labels, strict=True):
            metrics = read_lines(Path(folder) / "metrics.jsonl").frame
            if key not in metrics:
                continue
            color, style = LINES[names.index(label)]
            values = finite(metrics[key], drop=False) * (100 if key == "val/acc" else 1)
            marker = "." if len(values) == 1 else None  # one epoch makes no line
            axes.plot(metrics["epoch"], values, color=color, linestyle=style, marker=marker, label=label)
        axes.set(title=title, ylabel=unit, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if not axes.lines:
            _not_recorded(axes)
        elif key == "train/br" and any((line.get_ydata() > 0).any() for line in axes.lines):
            axes.set_yscale("log", nonpositive="mask")  # before BR begins it is 0: no line
            axes.yaxis.set_major_formatter("{x:g}")
    _legend(figure, loc="outside lower left", title="a line per run", alignment="left")
    return figure


@matplotlib.rc_context(STYLE)
def levels_over_epochs(run_folder: Path) -> Figure:
    """Clustering, clipping, flips and alpha's drift over the epochs, for weights and activations."""
    panels = {
        "effectiveness": ("Clustering at the levels: 100 is all on a level", "effectiveness (%)", 1),
        "clip_fraction": ("Values beyond the outer levels", "clip_fraction (%)", 100),
        "flip_rate": ("Codes that changed since the last evaluation", "flip_rate (%)", 100),
        "alpha_drift": (
            "Step sizes, ln(alpha / alpha after warmup): 0 is unmoved",
            "alpha_drift (natural log)",
            1,
        ),
    }
    lines = read_lines(Path(run_folder) / "levels.jsonl")
    if lines.frame.empty:
        raise Unreadable("; ".join(lines.problems))
    table = levels_by_epoch(lines.frame, list(panels))
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    warmup = _warmup_epochs(run_folder)
    for axes, (key, (title, unit, scale)) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        axes.set(title=title, ylabel=unit, xlabel="epoch" if axes.get_subplotspec().is_last_row() else None)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if f"{key}_mean" not in table or table[f"{key}_mean"].isna().all():
            _not_recorded(axes)
            continue
        _draw_levels(axes, table, key, scale)
        if key == "effectiveness":
            axes.axhline(50, color="0.5", linewidth=0.8)
            axes.annotate("uniform in the bins", (1, 50), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color="0.35", fontsize=7)  # fmt: skip
        if warmup is not None and 0 < warmup < table["epoch"].max():
            axes.axvline(warmup, color=BLACK, linestyle=":", linewidth=1, label="end of warmup")
    _legend(figure, loc="outside lower center", ncols=3)
    figure.suptitle(f"{_name(run_folder)}: mean over the sites, band from lowest to highest", x=0.01, ha="left")
    return figure


def integer_levels(edges: np.ndarray, bits: int | None) -> range:
    """The codes of a site's grid. Edges run from a step and half a bar below qn to above qp."""
    qn, qp = int(np.ceil(edges[0])) + 1, int(np.floor(edges[-1])) - 1
    return range(qn, qp + 1, 2 if bits == 1 and qn < 0 else 1)  # 1-bit weights are {-1, +1}: no zero


def _draw_histogram(axes: Axes, histogram: Histogram, warmup: int | None) -> None:
    last = max(histogram.counts)
    first = max((epoch for epoch in histogram.counts if epoch <= (warmup or 0)), default=min(histogram.counts))
    when = "before BR" if warmup is not None and first <= warmup else "first on record"
    if first != last:
        axes.stairs(_percent(histogram.counts[first]), histogram.edges, fill=True, color=SKY, alpha=0.7,
                    label=f"epoch {first}, {when}")  # fmt: skip
    axes.stairs(_percent(histogram.counts[last]), histogram.edges, color=VERMILLION, linewidth=1.1,
                label=f"epoch {last}, the end")  # fmt: skip


def _draw_levels(axes: Axes, table: pd.DataFrame, key: str, scale: float) -> None:
    few = table["bits"].min()
    for kind, name, color in (("weight", "weights", BLUE), ("act", "activations", ORANGE)):
        of_kind = table[table["kind"] == kind]
        for bits, part in of_kind.groupby("bits"):
            style = {("weight", True): "-", ("act", True): "--"}.get((kind, bits == few), ":")
            label = f"{name}, {bits:g} bit ({part['sites'].max()} sites)"
            mean, low, high = (scale * part[f"{key}_{what}"] for what in ("mean", "min", "max"))
            axes.plot(part["epoch"], mean, color=color, linestyle=style, label=label)
            axes.fill_between(part["epoch"], low, high, color=color, alpha=0.15, linewidth=0)


def _layers(histograms: dict[str, Histogram], bits: dict[str, int]) -> list[str]:
    """Up to MAX_ROWS layers spread over the depth, among those with the fewest bits."""
    few = min((bits[site] for site in histograms if site in bits), default=None)
    sites = [site for site in histograms if bits.get(site) == few]
    layers = list(dict.fromkeys(site.rpartition(".")[0] for site in sites))
    spread = np.linspace(0, len(layers) - 1, min(MAX_ROWS, len(layers))).round().astype(int)
    return [layers[i] for i in spread]


def _name(run_folder: Path) -> str:
    return f"run {Path(run_folder).resolve().name}"


def _bits(run_folder: Path) -> dict[str, int]:
    levels = read_lines(Path(run_folder) / "levels.jsonl").frame
    if not {"site", "bits"} <= set(levels):
        return {}
    return levels.dropna(subset="bits").astype({"bits": int}).set_index("site")["bits"].to_dict()


def _warmup_epochs(run_folder: Path) -> int | None:
    try:
        warmup = read_config(run_folder).get("warmup_epochs")
    except Unreadable:  # load_runs names it; the figure only goes without its mark
        return None
    return warmup if is_number(warmup) else None


def _percent(counts: np.ndarray) -> np.ndarray:
    return 100 * counts / max(counts.sum(), 1)


def _legend(figure: Figure, **where) -> None:
    """One legend for all panels, each label once."""
    handles = {}
    for axes in figure.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), **where)


def _not_recorded(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="0.4")
