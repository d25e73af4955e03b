"""The table settings x seeds, and levels over epochs: frames in, frames out, Markdown last.

A row is one combination of the settings that vary among the runs, the seed apart. A figure brings its n:
mean +- sample standard deviation (ddof=1) over the completed runs, and for a single run no spread at all.
"""

import math

import numpy as np
import pandas as pd

from .load import Runs, gathered

ACCURACIES = ("test_acc", "val_acc", "float_test_acc")  # fractions in the files, percent on paper
METRICS = (*ACCURACIES, "seconds")
SEED = "config.seed"
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


def with_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs whose config could be read. The others belong to no row: averaging them would mix settings."""
    return frame[frame.filter(regex=r"^config\.").notna().any(axis=1)]


def varying(frame: pd.DataFrame) -> list[str]:
    """The config columns, seed apart, in which the runs differ; a key that some lack differs as well."""
    settings = with_settings(frame).filter(regex=r"^config\.").drop(columns=SEED, errors="ignore")
    return [key for key in settings if settings[key].nunique(dropna=False) > 1]


def groups(frame: pd.DataFrame) -> list[tuple[tuple, pd.DataFrame]]:
    """(values of the varying settings, their runs) for each combination, in order of the values."""
    frame, keys = with_settings(frame), varying(frame)
    if frame.empty:
        return []
    if not keys:
        return [((), frame)]
    return sorted(frame.groupby(keys, sort=False, dropna=False), key=lambda group: _order(group[0]))


def settings_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per combination: its settings, seeds, METRIC_mean, METRIC_sd, METRIC_n and `not_completed`."""
    keys, rows = varying(frame), []
    for values, runs in groups(frame):
        done = runs[runs["status"] == "completed"]
        row = dict(zip(keys, values, strict=True))
        row["seeds"] = sorted(done[SEED], key=lambda seed: _order((seed,))) if SEED in done else []
        for metric in METRICS:
            figures = finite(done[metric]) if metric in done else pd.Series(dtype=float)
            row[f"{metric}_mean"] = figures.mean()
            row[f"{metric}_sd"] = figures.std(ddof=1)  # NaN for a single run
            row[f"{metric}_n"] = len(figures)
        row["not_completed"] = _counted(runs.loc[runs["status"] != "completed", "status"])
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


def to_markdown(table: pd.DataFrame) -> str:
    """A settings_table as Markdown, padded so that it reads in a terminal too."""
    settings = [name for name in table if name.startswith("config.")]
    header = [name.removeprefix("config.") for name in settings]
    header += ["seeds", *(f"{name} %" if name in ACCURACIES else name for name in METRICS), "not completed"]
    body = [
        [show(row[name]) for name in settings]
        + [", ".join(map(show, row["seeds"])) or "-"]
        + [_cell(row, metric) for metric in METRICS]
        + [row["not_completed"] or "-"]
        for row in table.to_dict("records")
    ]
    rows = [[text.replace("|", r"\|") for text in row] for row in [header, *body]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def footer(runs: Runs) -> str:
    """What a reader must know to believe the table: how it was counted, and all that is not in it."""
    frame = runs.frame
    notes = [
        f"{len(frame)} runs: {_counted(frame['status'])}. Only completed runs enter the means.",
        "mean +- sample standard deviation (ddof=1) over n runs. Accuracies in percent.",
    ]
    known, keys = with_settings(frame), varying(frame)
    constant = [key for key in ALWAYS_NAMED if f"config.{key}" in known and f"config.{key}" not in keys]
    if constant:
        named = ", ".join(f"{key}={show(known[f'config.{key}'].iloc[0])}" for key in constant)
        notes.append(f"The same in every run: {named}.")
    if "git_sha" in frame and frame["git_sha"].nunique() > 1:
        notes.append(f"The runs come from {frame['git_sha'].nunique()} versions of the code (git_sha).")
    unknown = frame.loc[frame.index.difference(known.index), "path"]
    if len(unknown):
        notes.append(f"In no row, settings unknown: {', '.join(unknown)}.")
    for _, group in groups(frame):
        done = group[group["status"] == "completed"]
        again = done[done.duplicated(SEED, keep=False)] if SEED in done else done[:0]
        if len(again):
            notes.append(f"Same settings and seed more than once, each counted: {', '.join(again['path'])}.")
    notes += gathered(runs.problems)
    return "\n".join(f"- {note}" for note in notes)


def runs_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A line per run for runs.csv: the settings that vary, the seed, the whole summary, the path."""
    settings = [name for name in frame if name == SEED or name in varying(frame)]
    summary = [name for name in frame if not name.startswith("config.") and name != "path"]
    return frame[[*settings, *summary, "path"]]


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


def _cell(row: dict, metric: str) -> str:
    mean, sd, n = (row[f"{metric}_{part}"] for part in ("mean", "sd", "n"))
    scale = 100 if metric in ACCURACIES else 1
    if n == 0:
        return "-"
    spread = f" +- {scale * sd:.1f}" if n > 1 else ""
    return f"{scale * mean:.1f}{spread} (n={n})"


def _counted(statuses: pd.Series) -> str:
    return ", ".join(f"{count} {status}" for status, count in statuses.value_counts().sort_index().items())


def _order(values: tuple) -> list:
    """Sort key for mixed settings: absent, then numbers by size, then words."""
    return [
        (0, 0, "") if value is None or value != value
        else (1, value, "") if isinstance(value, (int, float))
        else (2, 0, str(value))
        for value in values
    ]  # fmt: skip
