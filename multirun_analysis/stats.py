"""What runs say together: means with their intervals, and differences that are paired by seed.

A setting is one combination of the config keys in which the runs differ, the seed apart. Its runs with different seeds
are its samples. Every spread brings its n: sample standard deviation (ddof=1), and the 95 % interval of the mean by
Student's t. One run has neither.

A control is a setting without regularization, and another setting's control is the one that agrees with it in
everything else. Differences are taken seed by seed, over the seeds that both have: what a seed does to both drops out.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from .load import is_number

SEED = "config.seed"
CONFIDENCE = 0.95
LAMBDAS = {"lambda_br": "config.regularizer.lambda_br", "lambda_br_act": "config.regularizer.lambda_br_act"}
REGULARIZER, UNREGULARIZED = "config.regularizer._target_", "brqat.regularizer.none."
POLICIES = ("config.alpha_policy.weight", "config.alpha_policy.act")
OF_A_RUN = (
    "path", "status", "test_acc", "val_acc", "float_test_acc", "seconds", "weight_bits", "act_bits", "weight_bytes",
    "bops",
)  # fmt: skip
# What is averaged over the seeds of a setting. gap: of a run to the float network of its own seed.
FIGURES = ("test_acc", "val_acc", "float_test_acc", "gap", "seconds")


class Estimate(NamedTuple):
    """A mean over n values; NaN where n is too small for what stands there."""

    mean: float
    sd: float  # ddof=1
    n: int
    low: float  # of the 95 % interval of the mean
    high: float


class Setting(NamedTuple):
    """Runs that differ in their seed only."""

    values: tuple  # of the keys that vary
    runs: list[dict]  # all of them, whatever became of them
    counted: list[dict]  # completed, one per seed: what enters the means
    again: list[dict]  # completed, with a seed that is counted already


class Comparison(NamedTuple):
    """A setting's difference to its control in test accuracy, over the seeds that both have."""

    control: int  # its place among the settings
    difference: Estimate


def estimate(values: Iterable[float]) -> Estimate:
    """values: any number of them; what is no finite number is left out and not counted in n."""
    x = np.array([value for value in values if is_number(value)], dtype=float)
    n = len(x)
    if n == 0:
        return Estimate(math.nan, math.nan, 0, math.nan, math.nan)
    mean = float(x.mean())
    if n == 1:
        return Estimate(mean, math.nan, 1, math.nan, math.nan)
    sd = float(x.std(ddof=1))
    # The quantile of Student's t as scipy.stats.t.ppf takes it, without half a second of importing scipy.stats.
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(n)
    return Estimate(mean, sd, n, mean - half, mean + half)


# ---- settings


def with_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs whose config could be read. The others belong to no setting: averaging them would mix settings."""
    return frame[frame.filter(regex=r"^config\.").notna().any(axis=1)]


def varying(frame: pd.DataFrame) -> list[str]:
    """The config columns, seed apart, in which the runs differ; a key that some lack differs as well."""
    known = with_settings(frame).filter(regex=r"^config\.").drop(columns=SEED, errors="ignore")
    return [key for key in known if known[key].nunique(dropna=False) > 1]


def keys_of(frame: pd.DataFrame, by: Sequence[str] | None = None) -> list[str]:
    """The columns that make a setting: those that vary, or the given ones. Raises ValueError for an unknown one."""
    if not by:
        return varying(frame)
    keys = [key if key.startswith("config.") else f"config.{key}" for key in by]
    for key in keys:
        if key not in frame:
            known = [name for name in frame if name.startswith("config.")]
            near = [name.removeprefix("config.") for name in known if name.endswith(f".{key.rpartition('.')[2]}")]
            hint = f"Did you mean {' or '.join(near)}?" if near else "Keys are those of .hydra/config.yaml."
            raise ValueError(f"--by {key.removeprefix('config.')}: no run has this key. {hint}")
    return keys


def settings(frame: pd.DataFrame, keys: Sequence[str]) -> list[Setting]:
    """The settings in order of their values.

    keys: what makes a setting. If they are fewer than what varies, a setting's runs differ in more than their seed, and
    only those that agree in all of it count once.
    """
    known = with_settings(frame)
    same = [key for key in (SEED, *varying(frame)) if key in known]
    columns = {*OF_A_RUN, REGULARIZER, *LAMBDAS.values(), *POLICIES, *keys, *same} & set(known)
    groups: dict[tuple, list[dict]] = {}
    for run in known[sorted(columns)].to_dict("records"):
        groups.setdefault(_values(run, keys), []).append(run)
    found = []
    for values, runs in sorted(groups.items(), key=lambda group: _order(group[0])):
        counted, again = {}, []
        # Of runs that agree in everything the first with figures counts.
        for run in sorted(runs, key=lambda run: not (is_number(run["test_acc"]) and is_number(run["val_acc"]))):
            if run["status"] == "completed":
                sample = _values(run, same) if isinstance(run.get(SEED), int) else run["path"]
                if sample in counted:
                    again.append(run)
                else:
                    counted[sample] = run
        found.append(Setting(values, runs, list(counted.values()), again))
    return found


def _values(run: dict, keys: Sequence[str]) -> tuple:
    """The run's values of some keys, where NaN, which equals nothing, stands for a key that it lacks: None."""
    return tuple(None if run[key] != run[key] else run[key] for key in keys)


def strength(run: dict, name: str) -> float:
    """lambda_br or lambda_br_act of a run; 0 where nothing is regularized, NaN where its config does not tell."""
    value, target = run.get(LAMBDAS[name]), run.get(REGULARIZER)
    if is_number(value):
        return float(value)
    if isinstance(value, (str, float)) and value == value:  # an interpolation, or infinity
        return math.nan
    with_another = any(is_number(run.get(key)) for key in LAMBDAS.values())
    other_kind = isinstance(target, str) and not target.startswith(UNREGULARIZED)
    return math.nan if other_kind and not with_another else 0.0


def is_control(setting: Setting) -> bool:
    """Whether nothing is regularized."""
    return all(strength(run, name) == 0 for run in setting.runs for name in LAMBDAS)


def bits_of(setting: Setting) -> str | None:
    """W2A2 and the like; None where no run has come to it."""
    pairs = {
        (run["weight_bits"], run["act_bits"])
        for run in setting.runs
        if is_number(run["weight_bits"]) and is_number(run["act_bits"])
    }
    if not pairs:
        return "bits not recorded" if setting.counted else None
    if len(pairs) > 1:
        return "several bit-widths"
    return "W{}A{}".format(*("float" if bits == 32 else f"{bits:g}" for bits in pairs.pop()))


def policy_of(setting: Setting) -> str | None:
    """The alpha policy: one word where weights and activations share it; None where the runs differ or have none."""
    pairs = {tuple(run.get(key) for key in POLICIES) for run in setting.runs}
    if len(pairs) != 1:
        return None
    weight, act = pairs.pop()
    if not isinstance(weight, str) or not isinstance(act, str):
        return None
    return weight if weight == act else f"{weight}, act {act}"


# ---- figures


def figures_of(runs: Sequence[dict]) -> dict[str, list[float]]:
    """What FIGURES name, seed by seed: of several runs with one seed their mean, for a seed is one sample."""
    with_gap = [run | {"gap": _gap(run)} for run in runs]
    return {name: list(_by_seed(with_gap, name).values()) for name in FIGURES}


def _gap(run: dict) -> float:
    test, base = run["test_acc"], run["float_test_acc"]
    return test - base if is_number(test) and is_number(base) else math.nan


def comparisons(found: Sequence[Setting], keys: Sequence[str]) -> list[Comparison | None]:
    """Each setting against its control; None for a control, and where there is none."""
    controls: dict[tuple, list[int]] = {}
    for place, setting in enumerate(found):
        if is_control(setting):
            controls.setdefault(_besides_the_regularizer(setting, keys, exact=False), []).append(place)
    compared = []
    for setting in found:
        places = controls.get(_besides_the_regularizer(setting, keys, exact=False), [])
        if is_control(setting) or not places:
            compared.append(None)
            continue
        exact = _besides_the_regularizer(setting, keys, exact=True)
        differences = {place: paired(setting.counted, found[place].counted) for place in places}
        # One that there is something to compare with, then the same policy, then the most seeds in common.
        place = max(
            places,
            key=lambda p: (
                differences[p].n > 0,
                _besides_the_regularizer(found[p], keys, exact=True) == exact,
                differences[p].n,
            ),
        )
        compared.append(Comparison(place, differences[place]))
    return compared


def paired(left: Sequence[dict], right: Sequence[dict], figure: str = "test_acc") -> Estimate:
    """Differences left - right over the seeds that both have; of several runs with one seed, their mean."""
    ours, theirs = _by_seed(left, figure), _by_seed(right, figure)
    return estimate(ours[seed] - theirs[seed] for seed in ours if seed in theirs and isinstance(seed, int))


def _by_seed(runs: Sequence[dict], figure: str) -> dict[object, float]:
    """Seed -> mean; a run without a seed stands for itself, under its path."""
    found: dict[object, list[float]] = {}
    for run in runs:
        if is_number(run[figure]):
            seed = run.get(SEED)
            found.setdefault(seed if isinstance(seed, int) else run["path"], []).append(run[figure])
    return {seed: sum(values) / len(values) for seed, values in found.items()}


def _besides_the_regularizer(setting: Setting, keys: Sequence[str], exact: bool) -> tuple:
    """The values in which a setting and its control agree.

    Not exact: without regularization its gradient cannot reach alpha, so that backprop is learnable there.
    """
    values = []
    for key, value in zip(keys, setting.values, strict=True):
        if key.startswith("config.regularizer."):
            continue
        value = "learnable" if not exact and key in POLICIES and value == "backprop" else value
        values.append(value)
    return tuple(values)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other dominates: less of the first and more of the second; by the first."""
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    found, best = [], -math.inf
    for place in order:
        if points[place][1] > best:
            found.append(place)
            best = points[place][1]
    return found


def _order(values: tuple) -> list:
    """Sort key for mixed settings: absent, then numbers by size, then words."""
    return [
        (0, 0, "") if value is None or value != value
        else (1, value, "") if isinstance(value, (int, float))
        else (2, 0, str(value))
        for value in values
    ]  # fmt: skip
