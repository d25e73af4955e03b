"""What the tables say, in words: which setting to use, how sure that is, and what is missing to be surer.

A setting is chosen by its validation accuracy, within each bit-width, and judged by its test accuracy. Settings with
several seeds go before any with one: the best of many single runs is the luckiest.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from .load import Runs, is_number
from .stats import Estimate
from .study import Study
from .tables import IN_PERCENT, estimate_in, show

ENOUGH_SEEDS = 3


class Answer(NamedTuple):
    """The best setting of a bit-width."""

    bits: str
    place: int  # its row
    setting: str
    accuracy: str  # on the test set
    words: list[str]  # how sure

    def __str__(self) -> str:
        return f"{self.bits}: {self.setting}: {self.accuracy}. {' '.join(self.words)}"


def best_of(table: pd.DataFrame, bits: str, regularized: bool = False) -> int | None:
    """The row of a bit-width with the best validation accuracy; None if no run of it completed.

    regularized: the best with regularization, where there is one.
    """
    rows = table[(table["bits"] == bits) & (table["val_acc_n"] > 0)]
    if rows.empty:
        return None
    if regularized and not rows["is_control"].all():
        rows = rows[~rows["is_control"].astype(bool)]
    several = rows[rows["val_acc_n"] > 1]
    rows = several if len(several) else rows
    if regularized:  # of equal ones the strongest: it shows what regularization does
        rows = rows.sort_values(["lambda_br", "lambda_br_act"], ascending=False, kind="stable")
    return int(rows["val_acc_mean"].astype(float).idxmax())


def widths(table: pd.DataFrame) -> list[str]:
    """The bit-widths of a table, narrow ones first; where there are several data sets, each of both."""
    if table.empty:
        return []
    return sorted(table["bits"].dropna().unique(), key=lambda name: (len(name), name))


def answers(table: pd.DataFrame) -> list[Answer]:
    """For each bit-width the setting to use."""
    found = []
    done = table[table["val_acc_n"] > 0] if len(table) else table
    keys = [key for key in table if key.startswith("config.") and done[key].nunique(dropna=False) > 1]
    if not keys and len(table) > 1:  # the others came to nothing, and this one is known by what they differ in
        keys = [key for key in table if key.startswith("config.")]
    for bits in widths(table):
        place = best_of(table, bits)
        if place is None:
            continue
        row = table.loc[place].to_dict()
        of_width = table[(table["bits"] == bits) & (table["val_acc_n"] > 0)]
        accuracy = f"{_percent(row, 'test_acc')} on the test set"
        found.append(Answer(bits, place, setting_text(row, keys), accuracy, _how_sure(row, of_width)))
    return found


def setting_text(row: dict, keys: Sequence[str] | None = None) -> str:
    """The values that make a row's setting, of all keys or of the given, as a person types them."""
    keys = [name for name in row if name.startswith("config.")] if keys is None else keys
    return " ".join(f"{key.removeprefix('config.')}={show(row[key])}" for key in keys) or "the only setting"


def _how_sure(row: dict, of_width: pd.DataFrame) -> list[str]:
    words = []
    test, gap, difference = (estimate_in(row, name) for name in ("test_acc", "gap", "difference"))
    if test.n == 1:
        words.append("One seed only: its spread is unknown.")
    elif test.n > 1:
        words.append(f"Over {test.n} seeds, 95 % interval of the mean {_interval(test, 'test_acc')}.")
    if gap.n:
        words.append(f"{_signed(gap, 'gap')} points against the float network of the same seeds.")
    if not is_number(row["lambda_br"]) or not is_number(row["lambda_br_act"]):
        words.append("Its runs differ in lambda: there is no lambda=0 arm to compare such a mixture with.")
    elif row["is_control"]:
        words.append(_against_regularized(row, of_width))
    elif difference.n > 1:
        verdict = _verdict(difference)
        words.append(
            f"{_signed(difference, 'difference')} points against lambda 0 over {difference.n} common seeds, "
            f"interval {_interval(difference, 'difference')}: {verdict}."
        )
        tried = int((of_width["difference_n"] > 1).sum())
        if tried > 1 and not difference.low <= 0 <= difference.high:
            words.append(f"The best of {tried} looks better than it is: confirm it with seeds that did not choose it.")
    elif difference.n == 1:
        words.append(f"{_signed(difference, 'difference')} points against lambda 0, over one common seed.")
    elif row["control"] is not None:
        words.append("Its lambda=0 arm has no completed run with a seed of this setting: run the same seeds.")
    else:
        words.append("No lambda=0 arm to compare with: what regularization changed cannot be told.")
    if len(of_width) > 1:
        words.append(_runner_up(row, of_width))
    return words


def _against_regularized(row: dict, of_width: pd.DataFrame) -> str:
    """What the best setting being a control says, and what it does not."""
    regularized = of_width[~of_width["is_control"].astype(bool)]
    if regularized.empty:
        return "That is the arm without regularization; nothing else was tried at this width."
    better = int((regularized["val_acc_mean"].astype(float) > row["val_acc_mean"]).sum())
    if better:  # passed over for their single seed
        have = "setting with one seed has" if better == 1 else "settings with one seed have"
        return (
            f"That is the arm without regularization; {better} regularized {have} higher validation accuracy: run more."
        )
    return "That is the arm without regularization: by validation, no regularized setting was better."


def levels_words(
    setting: str, before: dict[str, float], after: dict[str, float], control: dict[str, float] | None
) -> str:
    """What BR did to the levels of weights, in a sentence, from mean figures over layers and seeds.

    before, after: at the end of warmup and at the end, of the setting; control: at the end.
    """
    beside = f" ({control['effectiveness']:.1f} under lambda 0)" if control else ""
    words = [
        f"effectiveness {before['effectiveness']:.1f} after warmup, {after['effectiveness']:.1f} at the end{beside}"
    ]
    if "oscillation_share" in after:
        words.append(f"{100 * after['oscillation_share']:.1f} % oscillate at the end")
    if "alpha_path" in after:
        path = 100 * math.expm1(after["alpha_path"])
        words.append("step sizes stood still" if path == 0 else f"step sizes moved by {path:.1f} % to and fro")
    return f"Weights of the best regularized setting ({setting}), on average over layers: {', '.join(words)}."


def _verdict(difference: Estimate) -> str:
    if difference.low > 0:
        return "better with regularization"
    if difference.high < 0:
        return "worse with regularization"
    return "it holds 0, so that these seeds cannot tell the two apart"


def _runner_up(row: dict, of_width: pd.DataFrame) -> str:
    """How much the choice among the settings of a width means."""
    several = of_width[of_width["val_acc_n"] > 1]
    eligible = several if len(several) else of_width
    means, best = eligible["val_acc_mean"].astype(float), row["val_acc_mean"]
    passed = len(of_width) - len(eligible)
    over = f" ({passed} with one seed only left out)" if passed else ""
    if len(means) == 1:
        return f"Chosen as the only one with several seeds; {passed} with one seed left out."
    chosen = f"Chosen by validation among {len(means)} settings{over}"
    ties = int((means == best).sum()) - 1
    if ties:
        return f"{chosen}; {ties} more {'ties' if ties == 1 else 'tie'} with it."
    if not is_number(row["val_acc_low"]):
        return f"{chosen}, each with one seed: partly luck."
    within = int((means >= row["val_acc_low"]).sum()) - 1
    interval = _interval(estimate_in(row, "val_acc"), "val_acc")
    others = {0: "no other lies", 1: "1 other lies"}.get(within, f"{within} others lie")
    return f"{chosen}; {others} within the interval of its validation accuracy, {interval}."


def missing(runs: Runs, table: pd.DataFrame, studies: Sequence[Study]) -> list[str]:
    """What would make the answers surer, and what did not end well."""
    found = []
    done = table[table["test_acc_n"] > 0] if len(table) else table
    if len(done):
        single = int((done["test_acc_n"] == 1).sum())
        if single == len(done):
            found.append("One seed only, in every setting: no spread, no interval. Run more: seed=0,1,2.")
        elif single:
            found.append(f"{single} of {len(done)} settings have one seed only.")
        few = int(((done["test_acc_n"] > 1) & (done["test_acc_n"] < ENOUGH_SEEDS)).sum())
        if few:
            found.append(f"{few} settings have fewer than {ENOUGH_SEEDS} seeds: their intervals are very wide.")
        without = done[~done["is_control"].astype(bool) & done["control"].isna()]
        if not done["lambda_br"].map(is_number).all() or not done["lambda_br_act"].map(is_number).all():
            pass  # settings that average over lambda are compared with nothing, and their answers say so
        elif table["is_control"].any() and not done["is_control"].any():
            found.append("The lambda=0 arm has no completed run.")
        elif not done["is_control"].any():
            found.append(
                "No lambda=0 arm: add regularizer.lambda_br=0 regularizer.lambda_br_act=0 to know what BR changed."
            )
        elif len(without):
            found.append(f"{len(without)} settings have no lambda=0 arm that agrees with them in everything else.")
        if not done["float_test_acc_n"].any():
            found.append("No float accuracy: runs with pretrained=none have no float network beside them.")
    else:
        found.append("No run has completed with a test accuracy: there is nothing to compare yet.")
    for status, what in (
        ("diverged", "their loss was not finite"),
        ("failed", "their summary.json holds the error"),
        ("pruned", "the study gave them up, they have no test accuracy"),
        ("interrupted", "the same command with resume=true takes them to their end"),
        ("unfinished", "still running, or killed"),
        ("unreadable", "their summary.json is damaged"),
    ):
        count = int((runs.frame["status"] == status).sum())
        if count:
            found.append(f"{count} {'run' if count == 1 else 'runs'} {status}: {what}.")
    named = {name for name in runs.frame.get("study_name", pd.Series(dtype=object)).dropna()}
    for name in sorted(named - {study.name for study in studies}):
        found.append(
            f"The storage of study {name} was not found below the paths or not read: nothing of Optuna is shown. If it "
            "is a database: --storage postgresql://USER@HOST/DATABASE."
        )
    return found


def _percent(row: dict, name: str) -> str:
    figure = estimate_in(row, name)
    if not figure.n:
        return "no figure"
    spread = f" +- {100 * figure.sd:.1f}" if figure.n > 1 else ""
    return f"{100 * figure.mean:.1f}{spread} % (n={figure.n})"


def _signed(figure: Estimate, name: str) -> str:
    return f"{(100 if name in IN_PERCENT else 1) * figure.mean:+.1f}"


def _interval(figure: Estimate, name: str) -> str:
    scale = 100 if name in IN_PERCENT else 1
    sign = "+" if name in ("gap", "difference") else ""
    return f"[{scale * figure.low:{sign}.1f}, {scale * figure.high:{sign}.1f}]"
