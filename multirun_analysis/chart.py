"""A chart as data: what paper.py prints and screen.py shows, so that both show the same.

A chart is panels side by side, a panel is series on two axes (or a map, or parallel axes). Styles are numbered: each
number is a colour of Okabe and Ito's, which the colour-blind can tell apart, with a dash and a marker that say the
same again, so that a grey print reads too. Style REST is grey, for what stands behind.
"""

from collections.abc import Sequence
from typing import NamedTuple

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
RAMP = ("#4C78A8", "#F2A900")  # from least to most, for lines: both ends show on white and on black
GREY = "#7F7F7F"  # reads on white and on black
REST = -1


class Series(NamedTuple):
    """Points in order. low and high are bars about points and a band about a line."""

    name: str
    x: Sequence
    y: Sequence[float]
    kind: str  # points, line, both, bars (y as lengths, x as names), steps or filled (x as edges, one more than y)
    style: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    notes: Sequence[str] | None = None  # of each point, shown where a pointer rests on it


class Grid(NamedTuple):
    """A map of colours: values[row][column], None where nothing is known."""

    x: Sequence
    y: Sequence[str]
    values: Sequence[Sequence[float | None]]
    unit: str
    least: float
    most: float


class Axis(NamedTuple):
    """One of several parallel axes, with a value for each line. ticks: {position: what stands there}."""

    name: str
    values: Sequence[float]
    ticks: dict[float, str] | None = None


class Panel(NamedTuple):
    title: str
    x: str  # axis labels, with their units
    y: str
    series: Sequence[Series] = ()
    log_x: bool = False
    log_y: bool = False
    ticks: dict[float, str] | None = None  # on x, where numbers would mislead
    across: Sequence[tuple[float, str]] = ()  # horizontal lines and what they mean
    upright: Sequence[tuple[float, str]] = ()  # vertical ones
    grid: Grid | None = None
    parallel: Sequence[Axis] = ()  # the last one colours the lines


class Chart(NamedTuple):
    name: str  # of its files
    title: str  # says what to see
    alt: str  # the same for whoever cannot see it, with its figures
    panels: Sequence[Panel]
    columns: int = 2
