"""Charts for the report: plotly figures, a panel each, so that a phone can stack what a desk has side by side."""

import math
from collections.abc import Sequence

from plotly.graph_objects import Figure

from .chart import COLORS, GREY, RAMP, REST, Chart, Panel, Series

DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
HEIGHT, ROW = 340, 14  # pixels: of a panel, and of a row of a map


def drawn(chart: Chart) -> list[Figure]:
    """A figure for each panel. Backgrounds are clear and text has no colour: the page gives both."""
    return [_panel(panel) for panel in chart.panels]


def _panel(panel: Panel) -> Figure:
    figure = Figure()
    height = HEIGHT
    if panel.parallel:
        _parallel(figure, panel)
    elif panel.grid:
        height = max(HEIGHT, 120 + ROW * len(panel.grid.y))
        grid = panel.grid
        figure.add_heatmap(
            x=list(grid.x), y=list(grid.y), z=[list(row) for row in grid.values], zmin=grid.least, zmax=grid.most,
            colorscale="Cividis", colorbar={"title": {"text": grid.unit, "side": "top"}, "thickness": 12},
            hovertemplate="%{y}, epoch %{x}: %{z:.4g}<extra></extra>",
        )  # fmt: skip
        figure.update_yaxes(tickfont_size=9, automargin=True)
    else:
        for series in panel.series:
            _series(figure, series)
    for y, name in panel.across:
        figure.add_hline(y=y, line={"color": GREY, "dash": "dot", "width": 1}, annotation_text=name,
                         annotation_position="bottom left", annotation_font_size=10)  # fmt: skip
    for x, name in panel.upright:
        figure.add_vline(x=x, line={"color": GREY, "dash": "dot", "width": 1},
                         annotation_text=name, annotation_font_size=10)  # fmt: skip
    if not (panel.series or panel.grid or panel.parallel):
        figure.add_annotation(text="not recorded", x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    figure.update_xaxes(title_text=panel.x, title_standoff=8, automargin=True, type="log" if panel.log_x else None)
    figure.update_yaxes(title_text=panel.y, title_standoff=8, type="log" if panel.log_y else None)
    if panel.log_y:
        figure.update_yaxes(dtick="D2")  # 1, 2 and 5 of a decade: it may hold no power of ten
    if panel.ticks:
        figure.update_xaxes(tickvals=list(panel.ticks), ticktext=list(panel.ticks.values()))
    figure.update_layout(
        title={"text": panel.title, "font_size": 13, "x": 0, "xref": "paper", "y": 0.98, "yanchor": "top"},
        height=height, margin={"l": 56, "r": 12, "t": 34, "b": 44}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", template="none", hovermode="closest", bargap=0.3,
        legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0, "font_size": 11},
        showlegend=len({series.name for series in panel.series if series.name}) > 1,
    )  # fmt: skip
    if panel.parallel:
        figure.update_layout(margin={"l": 70, "r": 70, "t": 90})
    return figure


def _series(figure: Figure, series: Series) -> None:
    rest = series.style == REST
    color = GREY if rest else COLORS[series.style % len(COLORS)]
    dash, symbol = DASHES[series.style % len(DASHES)], SYMBOLS[series.style % len(SYMBOLS)]
    y = _plain(series.y)
    common = {"name": series.name, "showlegend": bool(series.name), "legendgroup": series.name}
    if series.kind == "bars":
        figure.add_bar(y=list(series.x)[::-1], x=y[::-1], orientation="h", marker_color=color, **common)
        figure.update_yaxes(automargin=True)
        return
    if series.kind in ("steps", "filled"):
        fill = {"fill": "tozeroy", "fillcolor": _clear(color, 0.45)} if series.kind == "filled" else {}
        figure.add_scatter(
            x=_plain(series.x), y=[*y, y[-1]], mode="lines", line={"shape": "hv", "color": color, "width": 1.3},
            hovertemplate="%{x:.3g}: %{y:.4g}<extra></extra>", **fill, **common,
        )  # fmt: skip
        return
    if series.low is not None and series.kind == "line":
        edges = [edge for edge in zip(series.x, series.low, series.high, strict=True) if _known(*edge)]
        x, low, high = ([edge[part] for edge in edges] for part in range(3))
        figure.add_scatter(
            x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=_clear(color, 0.15),
            mode="lines", line_width=0, hoverinfo="skip", showlegend=False, legendgroup=series.name,
        )  # fmt: skip
    bars = None
    if series.low is not None and series.kind != "line":
        up = [h - v if _known(h, v) else 0 for h, v in zip(series.high, series.y, strict=True)]
        down = [v - lo if _known(lo, v) else 0 for lo, v in zip(series.low, series.y, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}
    lonely = sum(value is not None for value in y) == 1
    mode = {"points": "markers", "both": "lines+markers", "line": "lines+markers" if lonely else "lines"}[series.kind]
    figure.add_scatter(
        x=list(series.x), y=y, mode=mode, error_y=bars, text=None if series.notes is None else list(series.notes),
        line={"color": color, "dash": dash, "width": 1 if rest else 2}, marker={"color": color, "symbol": symbol,
        "size": 5 if rest else 8}, hovertemplate="%{text}<extra></extra>" if series.notes is not None else None,
        **common,
    )  # fmt: skip


def _parallel(figure: Figure, panel: Panel) -> None:
    colors = _plain(panel.parallel[-1].values)
    figure.add_parcoords(
        line={"color": colors, "colorscale": [[0, RAMP[0]], [1, RAMP[1]]], "showscale": False},
        dimensions=[
            {"label": axis.name, "values": _plain(axis.values)}
            | ({"tickvals": list(axis.ticks), "ticktext": list(axis.ticks.values())} if axis.ticks else {})
            for axis in panel.parallel
        ],
    )


def _plain(values: Sequence) -> list:
    """Numbers as JSON has them."""
    return [None if value is None or not math.isfinite(value) else float(value) for value in values]


def _known(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _clear(color: str, alpha: float) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
