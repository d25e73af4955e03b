"""Tables: settings by seeds, runs one by one, levels over epochs. Frames in, frames out, text last."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from .load import Runs, gathered, is_number, printable
from .stats import (
    CONFIDENCE,
    FIGURES,
    LAMBDAS,
    POLICIES,
    SEED,
    Estimate,
    bits_of,
    comparisons,
    estimate,
    figures_of,
    is_control,
    policy_of,
    strength,
    varying,
)
from .stats import settings as settings_of

IN_PERCENT = ("test_acc", "val_acc", "float_test_acc", "gap", "difference")  # fractions in the files
# What tells one data set from another.
DATA = ("config.dataset._target_", "config.dataset.name", "config.dataset.root")
FOLDED = "config.alpha_policy"  # as it is typed
WITH_INTERVAL = ("test_acc", "difference")  # in the table; the others have theirs in the frame
HEADS = {
    "test_acc": "test_acc %",
    "val_acc": "val_acc %",
    "float_test_acc": "float_test_acc %",
    "gap": "gap to float",
    "difference": "vs lambda 0",
    "seconds": "seconds",
}
# A figure means little without these, so they are named even where they do not vary.
ALWAYS_NAMED = (
    "dataset._target_",
    "model._target_",
    "regularizer.lambda_br",
    "regularizer.lambda_br_act",
    "regularizer.normalize",
    "regularizer.units",
    "alpha_policy.weight",
    "alpha_policy.act",
    "quantizer.first_last_bits",
    "epochs",
    "warmup_epochs",
    "threads",
)


def settings_table(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A row per setting: values of the keys, seeds, estimates of the figures, and what did not complete.

    An estimate is five columns: FIGURE_mean, _sd, _n, _low, _high. `difference` is test accuracy against `control`,
    the row of the same settings without regularization.
    """
    found = settings_of(frame, keys)
    data = [key for key in DATA if key in keys]
    # Where settings average over other keys, their mixes differ, and so would what a difference is between.
    compared_with = comparisons(found, keys) if set(varying(frame)) <= set(keys) else [None] * len(found)
    rows = []
    for setting, compared in zip(found, compared_with, strict=True):
        row = dict(zip(keys, setting.values, strict=True))
        row["bits"], row["policy"] = _width(bits_of(setting), [row[key] for key in data]), policy_of(setting)
        for name in ("weight_bits", "act_bits", "weight_bytes", "bops"):
            row[name] = _the_only(run[name] for run in setting.runs)
        for name in LAMBDAS:
            row[name] = _the_only(strength(run, name) for run in setting.runs)
        with_figures = [run for run in setting.counted if is_number(run["test_acc"]) or is_number(run["val_acc"])]
        done = sorted(with_figures, key=lambda run: _numbers_first(run.get(SEED)))
        row["seeds"] = list(dict.fromkeys(run[SEED] for run in done if isinstance(run.get(SEED), int)))
        row["paths"] = [run["path"] for run in done]
        for name, values in figures_of(setting.counted).items():
            row |= _columns(name, estimate(values))
        row["is_control"] = is_control(setting)
        row["control"] = None if compared is None else compared.control
        row |= _columns("difference", estimate([]) if compared is None else compared.difference)
        row["not_completed"] = counted(run["status"] for run in setting.runs if run["status"] != "completed")
        rows.append(row)
    return pd.DataFrame([_folded(row) for row in rows] if _can_fold(rows) else rows, dtype=object)


def _width(bits: str | None, data: Sequence[object]) -> str | None:
    """What settings compete within: a bit-width and, where the runs have several, a data set."""
    if bits is None or not data:
        return bits
    # brqat.dataset.digits.load is the digits; what a data set does not have says nothing of it
    names = [show(value).removeprefix("brqat.dataset.").removesuffix(".load") for value in data]
    names = [name for name in names if name not in ("-", "null")]
    return f"{bits} on {', '.join(names)}"


def _can_fold(rows: Sequence[dict]) -> bool:
    """Whether weights and activations share their alpha policy in every row: one column then says it."""
    return all(key in row for row in rows for key in POLICIES) and all(
        row[POLICIES[0]] == row[POLICIES[1]] for row in rows
    )


def _folded(row: dict) -> dict:
    weight, act = POLICIES
    return {FOLDED if key == weight else key: value for key, value in row.items() if key != act}


def _numbers_first(value: object) -> tuple:
    return (0, value, "") if is_number(value) else (1, 0, str(value))


def _the_only(values: Iterable) -> float | None:
    """The number that all of them are, apart from those that are none."""
    numbers = {value for value in values if is_number(value)}
    return numbers.pop() if len(numbers) == 1 else None


def _columns(name: str, figure: Estimate) -> dict[str, float]:
    return {f"{name}_{part}": value for part, value in figure._asdict().items()}


def estimate_in(row: dict, name: str) -> Estimate:
    """An estimate from the columns of a settings_table's row."""
    return Estimate(*(row[f"{name}_{part}"] for part in Estimate._fields))


def cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Head and body of a settings_table as text."""
    keys = [name for name in table if name.startswith("config.")]
    shown = [name for name in (*FIGURES[:4], "difference", "seconds") if table[f"{name}_n"].any()]
    sizes = [name for name in ("weight_bytes", "bops") if table[name].notna().any()]
    head = [name.removeprefix("config.") for name in keys]
    head += ["seeds", *(HEADS[name] for name in shown), *sizes, "not completed"]
    body = [
        [show(row[name]) for name in keys]
        + [", ".join(map(show, row["seeds"])) or "-"]
        + [cell(row, name) for name in shown]
        + [f"{row[name]:,.0f}" if is_number(row[name]) else "-" for name in sizes]
        + [row["not_completed"] or "-"]
        for row in table.to_dict("records")
    ]
    return head, body


def cell(row: dict, name: str) -> str:
    """mean +- sd (n=3) [low, high]; without what a single run does not have."""
    if name == "difference" and row["is_control"]:
        return "control"
    return text_of(estimate_in(row, name), name, with_interval=name in WITH_INTERVAL)


def text_of(figure: Estimate, name: str, with_interval: bool = True) -> str:
    """An estimate as a person reads it; accuracies in percent."""
    scale = 100 if name in IN_PERCENT else 1
    sign = "+" if name in ("gap", "difference") else ""
    if figure.n == 0:
        return "-"
    mean = f"{scale * figure.mean:{sign}.1f}"
    if figure.n == 1:
        return f"{mean} (n=1)"
    spread = f"{mean} +- {scale * figure.sd:.1f} (n={figure.n})"
    return f"{spread} [{scale * figure.low:{sign}.1f}, {scale * figure.high:{sign}.1f}]" if with_interval else spread


def to_markdown(table: pd.DataFrame) -> str:
    """A settings_table as Markdown, padded so that it reads in a terminal too."""
    head, body = cells(table)
    rows = [[" ".join(text.split()).replace("|", r"\|") for text in row] for row in [head, *body]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def to_latex(table: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """A settings_table for LaTeX with the booktabs package; the notes as comments above it."""
    head, body = cells(table)
    return "\n".join(
        [
            *(f"% {line}" for note in notes for line in note.splitlines()),
            rf"\begin{{tabular}}{{{'l' * len(head)}}}",
            r"\toprule",
            " & ".join(map(_latex, head)) + r" \\",
            r"\midrule",
            *("{}" + " & ".join(map(_latex, row)) + r" \\" for row in body),  # a [ would be an argument of \\
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    escaped = "".join(special.get(character, character) for character in text)
    return escaped.replace("+-", r"$\pm$").replace("[-", "[$-$").replace(", -", ", $-$")


def notes(runs: Runs, table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """What a reader must know to believe the table: how it was counted, and all that is not in it."""
    frame = runs.frame
    found = [
        f"{len(frame)} runs: {counted(frame['status'])}. Only completed runs enter the means.",
        f"mean +- sample standard deviation (ddof=1) over n seeds [{CONFIDENCE:.0%} interval of the mean, by "
        "Student's t, which may pass 100 %]. Accuracies in percent.",
        "Each run's epoch was chosen on its validation split, and the test set read with that epoch. gap to float: to "
        "the float network of the same seed.",
    ]
    if len(table) and (table["difference_n"] > 0).any():
        found.append(
            "vs lambda 0: paired difference in test accuracy to the setting without regularization, over common seeds."
        )
    known = frame[frame.filter(regex=r"^config\.").notna().any(axis=1)]
    constant = [k for k in ALWAYS_NAMED if f"config.{k}" in known and known[f"config.{k}"].nunique(dropna=False) == 1]
    constant = [k for k in constant if f"config.{k}" not in keys]
    if constant:
        named = ", ".join(f"{key}={show(known[f'config.{key}'].iloc[0])}" for key in constant)
        found.append(f"The same in every run: {named}.")
    averaged = [key.removeprefix("config.") for key in varying(frame) if key not in keys]
    if averaged:
        found.append(f"Averaged over within a seed, though the runs differ in it: {', '.join(averaged)}.")
    if "git_sha" in frame and frame["git_sha"].nunique() > 1:
        found.append(f"The runs come from {frame['git_sha'].nunique()} versions of the code (git_sha).")
    unknown = frame.loc[frame.index.difference(known.index), "path"]
    if len(unknown):
        found.append(f"In no row, settings unknown: {_few(list(unknown))}.")
    again = [run["path"] for setting in settings_of(frame, keys) for run in setting.again]
    if again:
        found.append(
            f"Not counted, since another run has the same settings and seed: {_few(again)}. A seed is one sample."
        )
    return found + gathered(runs.problems)


def _few(paths: Sequence[str], most: int = 10) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more


def runs_table(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """A line per run: the settings that vary, the seed, the whole summary, the path."""
    config = [name for name in frame if name == SEED or name in keys]
    summary = [name for name in frame if not name.startswith("config.") and name != "path"]
    return frame[[*config, *summary]].assign(path=frame["path"].map(printable))


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with a type for each column, as Parquet needs: whole numbers, numbers, true or false, or text."""
    columns = {}
    for name in frame:
        values = [None if value is None or value != value else value for value in frame[name]]
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {bool} and kinds:
            columns[name] = pd.array(values, dtype="boolean")
        elif kinds <= {int} and kinds and all(value is None or abs(value) < 2**63 for value in values):
            columns[name] = pd.array(values, dtype="Int64")
        elif kinds <= {int, float}:
            columns[name] = pd.array([math.nan if value is None else float(value) for value in values], dtype="float64")
        else:
            columns[name] = pd.array([None if value is None else show(value) for value in values], dtype="string")
    return pd.DataFrame(columns, index=frame.index)


def levels_by_epoch(levels: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """METRIC_mean, _min and _max over the sites, by kind, bits and epoch; sites without a value left out.

    Bits stand apart because the 8-bit first and last layers would blur what the 2-bit ones do.
    """
    keys = ["kind", "bits", "epoch"]
    missing = [name for name in [*keys, "site"] if name not in levels]
    if missing:
        raise ValueError(f"levels.jsonl has no {', '.join(missing)}")
    sites = levels[[*keys, "site"]].assign(
        **{name: finite(levels[name], drop=False) for name in metrics if name in levels}
    )
    columns = {f"{name}_{how}": (name, how) for name in metrics if name in levels for how in ("mean", "min", "max")}
    return sites.groupby(keys, as_index=False).agg(sites=("site", "nunique"), **columns)


def finite(column: pd.Series, drop: bool = True) -> pd.Series:
    """A column as floats; what is no finite number is dropped, or NaN."""
    figures = pd.to_numeric(column, errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
    return figures.dropna() if drop else figures


def show(value: object) -> str:
    """A setting as a person types it; `-` where a run does not have the key."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:g}"
    return "-" if value is None else str(value)


def counted(statuses: Iterable[str]) -> str:
    """3 completed, 1 failed."""
    return ", ".join(f"{count} {status}" for status, count in sorted(Counter(statuses).items()))
