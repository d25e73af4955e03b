"""Rows of a benchmark timed in turns, and what is said of their figures."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def interleaved(rows: Mapping[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds per call of each row in each round; the order turns from round to round."""
    names, times = list(rows), {name: [] for name in rows}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            rows[name]()  # not timed: it fetches what the row needs back into the caches
            started = time.perf_counter()
            for _ in range(calls):
                rows[name]()
            times[name].append((time.perf_counter() - started) / calls)
    return times


def quotients(of: Sequence[float], by: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(of, by, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and as low and high the 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [*values] * 9
    return {"median": statistics.median(values), "low": tenths[0], "high": tenths[-1]}


def said(of: Mapping[str, float], digits: int = 3) -> str:
    return f"{of['median']:.{digits}f} ({of['low']:.{digits}f} to {of['high']:.{digits}f})"


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """The first row is the header."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
