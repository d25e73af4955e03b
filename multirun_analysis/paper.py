"""Charts for print: matplotlib figures, as PNG and SVG.

Figures are made without pyplot: no display, no global state, Agg on saving.
"""

import math
import os
from pathlib import Path

import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .chart import COLORS, GREY, RAMP, REST, Chart, Panel, Series

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
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
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "brqat",  # the same chart gives the same file
}


@matplotlib.rc_context(STYLE)
def drawn(chart: Chart) -> Figure:
    """The chart on a page of its own."""
    columns = min(chart.columns, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    tall = max((len(panel.grid.y) for panel in chart.panels if panel.grid), default=0)
    height = 1.0 + rows * max(1.9 if rows > 2 else 2.7, 0.16 * tall)
    figure = Figure(figsize=(4.6 * columns if columns > 1 else 7, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for panel, place in zip(chart.panels, axes, strict=False):
        _draw(place, panel)
    for place in list(axes)[len(chart.panels) :]:
        place.remove()
    _legend(figure)
    figure.suptitle(chart.title, x=0.01, ha="left", wrap=True)
    return figure


def save(chart: Chart, folder: Path) -> list[Path]:
    """Writes NAME.png and NAME.svg, each whole or not at all."""
    figure, files = drawn(chart), []
    with matplotlib.rc_context(STYLE):
        for ending in ("png", "svg"):
            file = folder / f"{chart.name}.{ending}"
            new = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            figure.savefig(new, format=ending, metadata={"Date": None} if ending == "svg" else None)
            os.replace(new, file)
            files.append(file)
    return files


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.parallel:
        return _draw_parallel(axes, panel)
    if panel.grid:
        return _draw_grid(axes, panel)
    for series in panel.series:
        _draw_series(axes, series)
    for y, name in panel.across:
        axes.axhline(y, color=GREY, linestyle=":", linewidth=1, label=name, zorder=0)
    for x, name in panel.upright:
        axes.axvline(x, color=GREY, linestyle=":", linewidth=0.8, label=name or None, zorder=0)
    if not panel.series:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(_few_minor)
    if panel.ticks:
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    elif panel.x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    return None


def _few_minor(value: float, _place: int) -> str:
    """2 and 5 of a decade; an axis within one would have no numbers else."""
    return f"{value:g}" if value > 0 and round(value / 10 ** math.floor(math.log10(value))) in (2, 5) else ""


def _draw_series(axes: Axes, series: Series) -> None:
    rest = series.style == REST
    color = GREY if rest else COLORS[series.style % len(COLORS)]
    dash, marker = DASHES[series.style % len(DASHES)], MARKERS[series.style % len(MARKERS)]
    x, y = series.x, np.array(series.y, dtype=float)
    label = series.name or None
    if series.kind == "bars":
        axes.barh(list(x)[::-1], y[::-1], color=color, label=label)
    elif series.kind in ("steps", "filled"):
        filled = series.kind == "filled"
        axes.stairs(y, x, fill=filled, color=color, alpha=0.6 if filled else 1, linewidth=1.1, label=label)
    elif series.low is not None and series.kind != "line":
        bars = np.nan_to_num([y - np.array(series.low, dtype=float), np.array(series.high, dtype=float) - y])
        line = dash if series.kind == "both" else ""
        axes.errorbar(x, y, bars, color=color, linestyle=line, marker=marker, markersize=4, capsize=2, label=label)
    else:
        line = "" if series.kind == "points" else dash
        one = np.isfinite(y).sum() == 1  # one epoch makes no line
        shown = marker if series.kind != "line" or one else None
        size, width = (2.5, 0.8) if rest else (4, 1.5)
        axes.plot(x, y, color=color, linestyle=line, marker=shown, markersize=size, linewidth=width, label=label)
        if series.low is not None:
            axes.fill_between(x, series.low, series.high, color=color, alpha=0.15, linewidth=0)


def _draw_grid(axes: Axes, panel: Panel) -> None:
    grid = panel.grid
    values = np.array([[math.nan if value is None else value for value in row] for row in grid.values])
    image = axes.imshow(values, cmap="cividis", vmin=grid.least, vmax=grid.most, aspect="auto", origin="lower",
                        interpolation="nearest", extent=(-0.5, len(grid.x) - 0.5, -0.5, len(grid.y) - 0.5))  # fmt: skip
    shown = np.unique(np.linspace(0, len(grid.x) - 1, min(len(grid.x), 12)).round().astype(int))
    axes.set_xticks(shown, [f"{grid.x[place]:g}" for place in shown])
    axes.set_yticks(range(len(grid.y)), grid.y, fontsize=6)
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label=grid.unit)


def _draw_parallel(axes: Axes, panel: Panel) -> None:
    scaled, places = [], range(len(panel.parallel))
    for axis in panel.parallel:
        values = np.array(axis.values, dtype=float)
        low, high = np.nanmin(values), np.nanmax(values)
        scaled.append((values - low) / (high - low) if high > low else np.full(len(values), 0.5))
        ticks = axis.ticks or {low: f"{low:.4g}", high: f"{high:.4g}"}
        for value, text in ticks.items():
            height = (value - low) / (high - low) if high > low else 0.5
            axes.annotate(text, (places[len(scaled) - 1], height), fontsize=7, ha="left", va="center",
                          xytext=(3, 0), textcoords="offset points")  # fmt: skip
        axes.axvline(len(scaled) - 1, color=GREY, linewidth=0.8)
    colors = matplotlib.colors.LinearSegmentedColormap.from_list("ramp", RAMP)
    for line in np.transpose(scaled):
        axes.plot(places, line, color=colors(line[-1] if math.isfinite(line[-1]) else 0), linewidth=0.8, alpha=0.7)
    axes.set_xticks(places, [axis.name for axis in panel.parallel])
    axes.set_yticks([])
    axes.grid(False)


def _legend(figure: Figure) -> None:
    """One legend for all panels, each name once."""
    handles: dict[str, object] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=min(3, len(handles)))
