"""Frames in, charts out: each function computes what it shows, and neither draws nor writes."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from .answers import best_of, widths
from .chart import COLORS, REST, Axis, Chart, Grid, Panel, Series
from .load import Histogram, Unreadable, is_number, read_config, read_histograms, read_lines
from .stats import front
from .study import Study
from .tables import estimate_in, levels_by_epoch, show, text_of

MAX_LINES = len(COLORS)  # that can be told apart
MAX_LEVELS = 16  # beyond that, lines at the levels hide the histogram
LAMBDA_NAMES = {"lambda_br": "lambda_br, on weights", "lambda_br_act": "lambda_br_act, on activations"}
# metric -> title, unit, scale
OF_LEVELS = {
    "effectiveness": ("Clustering: 100 is all on a level, 50 evenly spread", "effectiveness (%)", 1),
    "oscillation_share": ("Weights that oscillate between two levels", "oscillation_share (%)", 100),
    "flip_rate": ("Codes that changed since the last evaluation", "flip_rate (%)", 100),
    "alpha_path": ("How far the step sizes have moved in all", "alpha_path (ln of ratio)", 1),
    "alpha_drift": ("Step sizes against the end of warmup: 0 is unmoved", "alpha_drift (ln of ratio)", 1),
    "clip_fraction": ("Values beyond the outer levels", "clip_fraction (%)", 100),
}


class NoChart(ValueError):
    """The data for a chart are not there; the message says why."""


# ---- settings


def accuracy_against_lambda(table: pd.DataFrame) -> Chart:
    """Test accuracy over the strength of BR, a panel per bit-width and a series per alpha policy."""
    rows = [row for row in table.to_dict("records") if row["test_acc_n"] > 0 and row["bits"]]
    names = [
        name
        for name in LAMBDA_NAMES
        if len({row[name] for row in rows if is_number(row[name])}) > 1
    ]  # fmt: skip
    if not names:
        raise NoChart("no two completed settings differ in lambda_br or lambda_br_act")
    if len(names) == 2 and len({_ratio(*(row[name] for name in names)) for row in rows} - {None}) == 1:
        names = names[:1]  # one follows from the other
    panels, best = [], []
    for bits in widths(table):
        of_width = [row for row in rows if row["bits"] == bits]
        for name in names:
            known = [row for row in of_width if is_number(row[name])]
            lost = sum(1 for row in table.to_dict("records") if row["bits"] == bits and not row["test_acc_n"])
            panels.append(_against(name, bits, known, lost, joined=len(names) == 1))
        place = best_of(table, bits)
        if place is not None and of_width:
            top = table.loc[place]
            said = text_of(estimate_in(top.to_dict(), "test_acc"), "test_acc", with_interval=False)
            at = " and ".join(f"{name} {show(top[name])}" for name in names)
            best.append(f"{bits}: {said} at {at}, which validation prefers")
    return Chart(
        "accuracy_against_lambda",
        "Does regularization help? Test accuracy against lambda, 0 at the left; bars are 95 % intervals over seeds",
        "Test accuracy in percent against the strength of Bin Regularization. " + "; ".join(best) + ".",
        panels,
        columns=2 if len(names) == 2 else 3,
    )


def _ratio(left: object, right: object) -> float | None:
    """Of two strengths; None where it is not known."""
    if not is_number(left) or not is_number(right) or left == right == 0:
        return None
    return round(right / left, 9) if left > 0 else math.inf


def _against(name: str, bits: str, rows: list[dict], lost: int, joined: bool) -> Panel:
    rows = [row for row in rows if row[name] >= 0]
    positive = sorted({row[name] for row in rows if row[name] > 0})
    zero = 1.0  # where 0 stands on an axis that has no 0
    if positive:
        decades = math.log10(positive[-1]) - math.log10(positive[0])
        zero = positive[0] / 10 ** (max(0.3, decades / 6) if len(positive) > 1 else 0.5)
    series = []
    for place, policy in enumerate(sorted({row["policy"] or "-" for row in rows})):
        mine = sorted((row for row in rows if (row["policy"] or "-") == policy), key=lambda row: row[name])
        x = [row[name] or zero for row in mine]
        line = joined and len(set(x)) == len(x)
        series.append(_points(f"alpha {policy}", x, mine, "both" if line else "points", place))
    floats = [row["float_test_acc_mean"] for row in rows if row["float_test_acc_n"]]
    lines = [(100 * float(np.mean(floats)), "float")] if floats else []
    ticks = {zero: "0"} | {value: f"{value:g}" for value in _decades(positive)}
    if len(positive) <= 6 and all(high / low > 1.5 for low, high in pairwise([zero, *positive])):
        ticks = {zero: "0"} | {value: f"{value:.3g}" for value in positive}
    title = f"{bits} (without {lost} settings of which no run completed)" if lost else bits
    return Panel(title, LAMBDA_NAMES[name], "test accuracy (%)", series, log_x=True, ticks=ticks, across=lines)


def _decades(values: Sequence[float]) -> list[float]:
    if not values:
        return []
    low, high = math.ceil(math.log10(values[0])), math.floor(math.log10(values[-1]))
    return [10.0**power for power in range(low, high + 1)] or [values[-1]]


def _points(name: str, x: Sequence, rows: Sequence[dict], kind: str, style: int, figure: str = "test_acc") -> Series:
    def percent(part: str) -> list[float]:
        """An interval by Student's t may pass 100 %, and no accuracy can: its bar ends there."""
        return [min(100 * row[f"{figure}_{part}"], 100.0) for row in rows]

    notes = [f"{_setting(row)}<br>{text_of(estimate_in(row, figure), figure)} %" for row in rows]
    return Series(name, x, percent("mean"), kind, style, percent("low"), percent("high"), notes)


def _setting(row: dict) -> str:
    return "<br>".join(f"{key.removeprefix('config.')}={show(row[key])}" for key in row if key.startswith("config."))


def pareto(table: pd.DataFrame) -> Chart:
    """Test accuracy against what a network costs: bytes of its weights, and bit operations of a forward pass."""
    panels, said, left_out = [], [], False
    for name, label in (("weight_bytes", "weights (bytes)"), ("bops", "bit operations per picture (BOPs)")):
        rows = [row for row in table.to_dict("records") if row["test_acc_n"] > 0 and is_number(row[name])]
        if len({row[name] for row in rows}) < 2:
            continue
        series = []
        for place, bits in enumerate(widths(table)):
            mine = [row for row in rows if row["bits"] == bits]
            series.append(_points(bits, [row[name] for row in mine], mine, "points", place))
        # Settings with one seed are shown and make no front where others have several: the highest would be luck.
        several = [row for row in rows if row["test_acc_n"] > 1] or rows
        left_out |= len(several) < len(rows)
        for data in dict.fromkeys(_data_set(row) for row in several):  # no data set beats another
            mine = [row for row in several if _data_set(row) == data]
            best = [mine[place] for place in front([(row[name], row["test_acc_mean"]) for row in mine])]
            x, y = [row[name] for row in best], [100 * row["test_acc_mean"] for row in best]
            series.insert(0, Series("front", x, y, "line", REST))
            points = zip(y, best, x, strict=True)
            listed = ", ".join(f"{a:.1f} % (n={row['test_acc_n']}) at {b:,.0f}" for a, row, b in points)
            said.append(f"{name}{f' on {data}' if data else ''}: {listed}")
        panels.append(Panel(f"Test accuracy against {name}", label, "test accuracy (%)", series, log_x=True))
    if not panels:
        raise NoChart("all completed settings cost the same: there is no front")
    which = ", among those with several seeds" if left_out else ""
    return Chart(
        "pareto",
        f"What does accuracy cost? The grey front joins settings that no smaller one beats{which}",
        f"Settings on the Pareto front{which}. {'; '.join(said)}.",
        panels,
    )


def _data_set(row: dict) -> str:
    return row["bits"].partition(" on ")[2] if row["bits"] else ""


# ---- the course of runs


def learning_curves(runs: dict[str, Sequence[Path]]) -> Chart:
    """Validation accuracy, cross-entropy and BR over the epochs. runs: name -> folders, of which the mean is drawn."""
    if len(runs) > MAX_LINES:
        raise ValueError(f"{len(runs)} names in one chart, but only {MAX_LINES} lines can be told apart")
    panels, ends = [], []
    for key, title, unit, scale in (
        ("val/acc", "Validation accuracy: higher is better", "val/acc (%)", 100),
        ("train/ce", "Cross-entropy in training", "train/ce (nats)", 1),
        ("train/br", "Bin Regularization: falls as weights gather", "train/br (as logged, log scale)", 1),
    ):
        series = []
        for style, (name, folders) in enumerate(runs.items()):
            curve = _mean_over_runs([read_lines(Path(folder) / "metrics.jsonl").frame for folder in folders], key)
            if key == "train/br":  # before BR begins it is 0: no line on a logarithmic axis
                curve = curve[curve["mean"] > 0]
            if len(curve):
                low, high = (scale * curve[part] for part in ("min", "max"))
                band = (list(low), list(high)) if len(folders) > 1 else (None, None)
                y = list(scale * curve["mean"])
                series.append(Series(name, list(curve.index), y, "line", style, *band))
                if key == "val/acc":
                    ends.append(f"{name} ends at {y[-1]:.1f}")
        panels.append(Panel(title, "epoch", unit, series, log_y=key == "train/br" and bool(series)))
    alt = f"Validation accuracy in percent: {'; '.join(ends)}." if ends else "No run has written an epoch."
    title = "How did training go? Lines are means over seeds, bands from lowest to highest"
    return Chart("learning_curves", title, alt, panels, columns=3)


def _mean_over_runs(frames: Sequence[pd.DataFrame], key: str) -> pd.DataFrame:
    """mean, min and max of a column by epoch, over the runs that have it."""
    columns = [pd.to_numeric(f.set_index("epoch")[key], errors="coerce") for f in frames if key in f]
    if not columns:
        return pd.DataFrame(columns=["mean", "min", "max"])
    table = pd.concat(columns, axis=1).replace([np.inf, -np.inf], np.nan).dropna(how="all").sort_index()
    return table.agg(["mean", "min", "max"], axis=1)


def levels_over_epochs(runs: dict[str, Sequence[Path]], kind: str, bits: int, tag: str) -> Chart:
    """How the levels of one kind of site fared, a line per name. runs: name -> folders; kind: weight or act."""
    if len(runs) > MAX_LINES:
        raise ValueError(f"{len(runs)} names in one chart, but only {MAX_LINES} lines can be told apart")
    tables = {name: _levels([Path(folder) for folder in folders]) for name, folders in runs.items()}
    warmups = {warmup_epochs(Path(folder)) for folders in runs.values() for folder in folders}
    warmup = warmups.pop() if len(warmups) == 1 else None
    panels, ends = [], []
    for key, (title, unit, scale) in OF_LEVELS.items():
        series = []
        for style, (name, table) in enumerate(tables.items()):
            if f"{key}_mean" not in table:
                continue
            part = table[(table["kind"] == kind) & (table["bits"] == bits)].dropna(subset=f"{key}_mean")
            if len(part):
                mean, low, high = (list(scale * part[f"{key}_{what}"]) for what in ("mean", "min", "max"))
                series.append(Series(name, list(part["epoch"]), mean, "line", style, low, high))
                if key == "effectiveness":
                    ends.append(f"{name} ends at {mean[-1]:.1f}")
        upright = [(warmup, "BR begins")] if warmup and series else []
        if series:
            panels.append(Panel(title, "epoch", unit, series, upright=upright))
    if not panels:
        raise NoChart(f"no run has levels of {kind} sites at {bits} bits")
    things = "weights" if kind == "weight" else "activations"
    return Chart(
        f"levels_{kind}_{tag}",
        f"{tag}, {things} at {bits} bits: did they gather at their levels, and did the step sizes hold still? "
        "Lines are means over sites and seeds, bands from the lowest to the highest site",
        f"Effectiveness of {things} in percent, where 100 is all on a level and 50 evenly spread: {'; '.join(ends)}.",
        panels,
        columns=3,
    )


def _levels(folders: Sequence[Path]) -> pd.DataFrame:
    """levels_by_epoch over several runs: means of their means, from the lowest to the highest site of any."""
    tables = []
    for folder in folders:
        lines = read_lines(folder / "levels.jsonl").frame
        if len(lines) and {"kind", "bits", "site"} <= set(lines):
            tables.append(levels_by_epoch(lines, list(OF_LEVELS)))
    if not tables:
        return pd.DataFrame()
    together = pd.concat(tables)
    how = {name: name.rpartition("_")[2] for name in together if name.endswith(("_mean", "_min", "_max"))}
    return together.groupby(["kind", "bits", "epoch"], as_index=False).agg(how)


def levels_at(folders: Sequence[Path], kind: str, bits: int, epoch: int | None = None) -> dict[str, float]:
    """Mean figures over sites and runs at an epoch, or at the last; empty where there are none."""
    table = _levels(folders)
    if table.empty:
        return {}
    part = table[(table["kind"] == kind) & (table["bits"] == bits)]
    part = part[part["epoch"] == (part["epoch"].max() if epoch is None else epoch)]
    means = {key: part[f"{key}_mean"].mean() for key in OF_LEVELS if f"{key}_mean" in part}
    return {key: float(value) for key, value in means.items() if value == value}


def effectiveness_map(folder: Path, name: str) -> Chart:
    """Effectiveness of every site over the epochs, in the order of the net."""
    levels = _read_levels(folder)
    if "effectiveness" not in levels:
        raise NoChart(f"{folder}: levels.jsonl has no effectiveness")
    epochs = sorted(levels["epoch"].unique())
    panels, said = [], []
    for kind, things in (("weight", "weights"), ("act", "activations")):
        part = levels[levels["kind"] == kind]
        if part.empty:
            continue
        sites = list(dict.fromkeys(part["site"]))
        table = {(row.site, row.epoch): row.effectiveness for row in part.itertuples()}
        values = [[_number(table.get((site, epoch))) for epoch in epochs] for site in sites]
        bits = part.drop_duplicates("site").set_index("site")["bits"]
        labels = [f"{site} ({show(bits[site])} bit)" for site in sites]
        known = [value for row in values for value in row if value is not None] or [0]
        ends = 5 * math.floor(min(known) / 5), 5 * math.ceil(max(known) / 5 + 1e-9)
        grid = Grid(epochs, labels, values, "effectiveness (%)", *ends)
        panels.append(Panel(f"{things}: bright is on its levels", "epoch", "", grid=grid))
        last = [row[-1] for row in values if row[-1] is not None]
        if last:
            said.append(f"{things} end between {min(last):.0f} and {max(last):.0f} percent over {len(sites)} sites")
    if not panels:
        raise NoChart(f"{folder}: levels.jsonl names neither weights nor activations")
    title = f"{name}: which layers gather at their levels, and when?"
    return Chart("effectiveness_map", title, f"Effectiveness by site and epoch: {'; '.join(said)}.", panels)


def level_histograms(folder: Path, name: str, most_layers: int | None = None) -> Chart:
    """Histograms of v/alpha before BR and at the end: weights left, activations right, a layer per row.

    most_layers: of those with the fewest bits, spread over the depth; None: all layers.
    """
    histograms = read_histograms(folder)
    bits, warmup = _bits(folder), warmup_epochs(folder)
    panels = []
    layers = _layers(histograms, bits, most_layers)
    for layer in layers:
        for suffix, label in (("weight", "weights: v / alpha"), ("input", "activations: v / alpha")):
            site = f"{layer}.{suffix}"
            title = f"{site}, {bits[site]} bit" if site in bits else site
            unit = "elements (%)" if suffix == "weight" else "elements (%, log)"
            if site not in histograms:
                panels.append(Panel(title, label, unit))
                continue
            levels = integer_levels(histograms[site].edges, bits.get(site))
            upright = [(level, "") for level in levels] if len(levels) <= MAX_LEVELS else []
            # A ReLU's zeros fill one bar with half of all elements: a linear axis would show nothing else.
            steps = _before_and_after(histograms[site], warmup)
            panels.append(Panel(title, label, unit, steps, log_y=suffix == "input", upright=upright))
    shown = f" ({len(layers)} of {len({site.rpartition('.')[0] for site in histograms})} layers)" if most_layers else ""
    return Chart(
        "level_histograms",
        f"{name}: do the values gather at the integer levels (dotted)?{shown}",
        f"Histograms of weights and activations in units of their step size, {len(layers)} layers, "
        "before Bin Regularization begins and at the end.",
        panels,
    )


def _before_and_after(histogram: Histogram, warmup: int | None) -> list[Series]:
    histogram = _trimmed(histogram)
    last = max(histogram.counts)
    first = max((epoch for epoch in histogram.counts if epoch <= (warmup or 0)), default=min(histogram.counts))
    when = "before BR" if warmup is not None and first <= warmup else "first on record"
    series = []
    if first != last:
        name = f"epoch {first}, {when}"
        series.append(Series(name, histogram.edges, _percent(histogram.counts[first]), "filled", 4))
    return [*series, Series(f"epoch {last}, the end", histogram.edges, _percent(histogram.counts[last]), "steps", 5)]


def _trimmed(histogram: Histogram) -> Histogram:
    """Without the bars at either end that no epoch has filled: 8-bit weights fill a few of their 256 levels."""
    filled = np.flatnonzero(sum(histogram.counts.values()))
    if len(filled) == 0:
        return histogram
    first, last = max(filled[0] - 2, 0), min(filled[-1] + 3, len(histogram.edges) - 1)
    counts = {epoch: row[first:last] for epoch, row in histogram.counts.items()}
    return Histogram(histogram.edges[first : last + 1], counts)


def integer_levels(edges: np.ndarray, bits: int | None) -> range:
    """The codes of a site's grid. Edges run from a step and half a bar below qn to above qp."""
    qn, qp = int(np.ceil(edges[0])) + 1, int(np.floor(edges[-1])) - 1
    return range(qn, qp + 1, 2 if bits == 1 and qn < 0 else 1)  # 1-bit weights are {-1, +1}: no zero


# ---- studies


def study_history(study: Study) -> Chart:
    """Each trial's objective in order, and the best so far."""
    panels, said = [], []
    for place, (name, direction) in enumerate(study.objectives):
        rows = _measured(study, place)
        if not rows:
            continue
        sign = 1 if direction == "maximize" else -1
        best = list(sign * np.maximum.accumulate([sign * row[f"value_{place}"] for row in rows]))
        series = [Series(f"best so far ({direction})", [row["number"] for row in rows], best, "line", REST)]
        for style, (control, label) in enumerate(((False, "trial"), (True, "control, lambda 0"))):
            mine = [row for row in rows if row["control"] == control]
            series.append(_trials(label, mine, place, "number", style, study))
        panels.append(Panel(f"{name} by trial", "trial", name, [one for one in series if len(one.x)]))
        said.append(f"{name} came to {best[-1]:.4g} after {len(rows)} trials")
    if not panels:
        raise NoChart(f"study {study.name} has no measured trial")
    title = f"Study {study.name}: is it still finding better settings?"
    return Chart(f"study_{safe(study.name)}_history", title, "; ".join(said) + ".", panels)


def study_importances(study: Study) -> Chart:
    """Which parameters moved the objective, by fANOVA."""
    if not study.importances:
        raise NoChart(f"study {study.name}: {study.without}")
    names, shares = list(study.importances), [100 * value for value in study.importances.values()]
    said = ", ".join(f"{name} {share:.0f} %" for name, share in zip(names, shares, strict=True))
    panel = Panel("Share of the objective's variance", "importance (%)", "", [Series("", names, shares, "bars")])
    title = f"Study {study.name}: what mattered? fANOVA over {study.without}"
    alt = f"Importances: {said}. Of few trials, or where values hardly differ, one outlier can make them."
    return Chart(f"study_{safe(study.name)}_importances", title, alt, [panel], columns=1)


def study_slices(study: Study) -> Chart:
    """The objective against each parameter alone."""
    rows, panels = _measured(study, 0), []
    name = study.objectives[0][0]
    for key in study.parameters:
        mine = [row for row in rows if _known(row.get(key))]
        values = [row[key] for row in mine]
        if len(set(values)) < 2:
            continue
        short = key.removeprefix("config.")
        if all(is_number(value) for value in values):
            numbers = sorted({value for value in values if value > 0})
            log = len(numbers) > 1 and numbers[-1] / numbers[0] > 30 and min(values) >= 0
            zero = numbers[0] / 10**0.5 if numbers else 1
            x, few = [value or zero if log else value for value in values], len(set(values)) <= 6
            ticks = {zero: "0"} | {v: f"{v:g}" for v in _decades(numbers)} if log else None
            ticks = {v: f"{v:g}" for v in sorted(set(values))} if few and not log else ticks
        else:
            names = sorted({show(value) for value in values})
            x, log, ticks = [names.index(show(v)) for v in values], False, dict(enumerate(names))
        series = []
        for style, (control, label) in enumerate(((False, "trial"), (True, "control, lambda 0"))):
            chosen = [place for place, row in enumerate(mine) if row["control"] == control]
            if chosen:
                notes = [_trial_note(mine[place], study) for place in chosen]
                y = [mine[place]["value_0"] for place in chosen]
                series.append(Series(label, [x[p] for p in chosen], y, "points", style, notes=notes))
        panels.append(Panel(short, short, name, series, log_x=log, ticks=ticks))
    if not panels:
        raise NoChart(f"study {study.name}: no parameter took two values in measured trials")
    title = f"Study {study.name}: where along each parameter is it good?"
    alt = f"{name} against {', '.join(panel.title for panel in panels)}, {len(rows)} trials."
    return Chart(f"study_{safe(study.name)}_slices", title, alt, panels, columns=3)


def study_parallel(study: Study) -> Chart:
    """A line per trial through its parameters to its objective."""
    rows = [row for row in _measured(study, 0) if all(_known(row.get(key)) for key in study.parameters)]
    if len(rows) < 2:
        raise NoChart(f"study {study.name} has fewer than two measured trials with all parameters")
    axes = []
    for key in study.parameters:
        values = [row[key] for row in rows]
        if all(is_number(value) for value in values):
            numbers = sorted({value for value in values if value > 0})
            if len(numbers) > 1 and numbers[-1] / numbers[0] > 30 and min(values) >= 0:
                zero = numbers[0] / 10**0.5
                ticks = {math.log10(v): f"{v:g}" for v in _decades(numbers)}
                ticks |= {math.log10(zero): "0"} if 0 in values else {}
                axes.append(Axis(key.split(".")[-1], [math.log10(value or zero) for value in values], ticks))
            else:
                axes.append(Axis(key.split(".")[-1], values, {v: f"{v:g}" for v in sorted(set(values))[:9]}))
        else:
            names = sorted({show(value) for value in values})
            places = [names.index(show(value)) for value in values]
            axes.append(Axis(key.split(".")[-1], places, dict(enumerate(names))))
    objective = study.objectives[0][0]
    axes.append(Axis(objective, [row["value_0"] for row in rows]))
    title = f"Study {study.name}: which settings go together? Orange lines have the highest {objective}"
    alt = f"{len(rows)} trials as lines through {', '.join(axis.name for axis in axes)}."
    panel = Panel("A line per trial", "", "", parallel=axes)
    return Chart(f"study_{safe(study.name)}_parallel", title, alt, [panel], columns=1)


OF_STUDIES: tuple[Callable[[Study], Chart], ...] = (study_history, study_importances, study_slices, study_parallel)


def _measured(study: Study, place: int) -> list[dict]:
    """Completed trials whose objective was measured; a diverged one stands for the worst and was not."""
    return [
        row
        for row in study.trials.to_dict("records")
        if row["state"] == "complete" and row["status"] != "diverged" and is_number(row[f"value_{place}"])
    ]


def _trials(label: str, rows: list[dict], place: int, x: str, style: int, study: Study) -> Series:
    values = [row[f"value_{place}"] for row in rows]
    notes = [_trial_note(row, study, place) for row in rows]
    return Series(label, [row[x] for row in rows], values, "points", style, notes=notes)


def _trial_note(row: dict, study: Study, place: int = 0) -> str:
    said = [f"trial {row['number']}: {row[f'value_{place}']:.4g}"]
    return "<br>".join([*said, *(f"{key}={show(row[key])}" for key in study.parameters if _known(row.get(key)))])


# ---- the parts


def warmup_epochs(folder: Path) -> int | None:
    try:
        warmup = read_config(folder).get("warmup_epochs")
    except Unreadable:  # load_runs names it; the chart only goes without its mark
        return None
    return warmup if is_number(warmup) else None


def _read_levels(folder: Path) -> pd.DataFrame:
    lines = read_lines(Path(folder) / "levels.jsonl")
    if lines.frame.empty or not {"site", "kind", "bits"} <= set(lines.frame):
        raise NoChart("; ".join(lines.problems) or f"{folder}/levels.jsonl has no sites")
    return lines.frame


def _layers(histograms: dict[str, Histogram], bits: dict[str, int], most: int | None) -> list[str]:
    if most is None:
        return list(dict.fromkeys(site.rpartition(".")[0] for site in histograms))
    few = min((bits[site] for site in histograms if site in bits), default=None)
    sites = [site for site in histograms if bits.get(site) == few]
    layers = list(dict.fromkeys(site.rpartition(".")[0] for site in sites))
    spread = np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int)
    return [layers[i] for i in spread]


def _bits(folder: Path) -> dict[str, int]:
    levels = read_lines(Path(folder) / "levels.jsonl").frame
    if not {"site", "bits"} <= set(levels):
        return {}
    return levels.dropna(subset="bits").astype({"bits": int}).set_index("site")["bits"].to_dict()


def _percent(counts: np.ndarray) -> np.ndarray:
    return 100 * counts / max(counts.sum(), 1)


def _number(value: object) -> float | None:
    return float(value) if is_number(value) else None


def _known(value: object) -> bool:
    return value is not None and value == value


def safe(name: str) -> str:
    """A name as part of a file's."""
    kept = (letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in name)
    return "".join(kept)[:80]
