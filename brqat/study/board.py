"""A study on a terminal: a table that follows it, and a line for each trial that ends."""

import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import rich
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.table import Table
from rich.text import Text

from brqat.study.ledger import Ledger, run_of

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
LATEST = 6  # ended trials that the live table shows
AROUND = 6  # lines of a terminal that its rows leave free: the standing, the header, a progress bar, a prompt


@dataclass(frozen=True)
class Standing:
    """Where a study stands."""

    name: str
    n_trials: int  # that it is to have
    completed: int
    pruned: int
    failed: int
    running: int
    waiting: int
    best: FrozenTrial | None  # None under several objectives
    front: int  # settings that no other dominates, under several objectives
    seconds_left: float | None
    epochs_saved: int  # by pruning
    epochs: int  # trained

    @property
    def ended(self) -> int:
        return self.completed + self.pruned + self.failed

    def in_words(self) -> str:
        parts = [f"{self.ended} of {self.n_trials} trials ended"]
        parts += [
            f"{count} {word}"
            for count, word in (
                (self.running, "running"),
                (self.waiting, "waiting"),
                (self.pruned, "pruned"),
                (self.failed, "failed"),
            )
            if count
        ]
        if self.best is not None:
            parts.append(f"best {self.best.value:.4f} (trial {self.best.number})")
        elif self.front:
            parts.append(f"{self.front} on the Pareto front")
        if self.epochs_saved:
            parts.append(f"pruning saved {self.epochs_saved} epochs of {self.epochs_saved + self.epochs}")
        if self.seconds_left:
            parts.append(f"about {duration(self.seconds_left)} left")
        return ", ".join(parts)


def standing(ledger: Ledger) -> Standing:
    trials = ledger.trials()
    count = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    wanted = ledger.rules.n_trials if ledger.rules else ledger.attrs.get("n_trials", 0)
    n_trials = max(wanted, len(trials))
    spent = [_seconds(trial) for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    # The median: the first trial may have trained the float baseline.
    left = n_trials - sum(trial.state.is_finished() for trial in trials)
    seconds_left = None
    if spent and left:
        seconds_left = left * statistics.median(spent) / max(count[TrialState.RUNNING], 1)
    several = len(ledger.study.directions) > 1
    ranked = best_first(ledger)
    return Standing(
        name=ledger.name,
        n_trials=n_trials,
        completed=count[TrialState.COMPLETE],
        pruned=count[TrialState.PRUNED],
        failed=count[TrialState.FAIL],
        running=count[TrialState.RUNNING],
        waiting=count[TrialState.WAITING],
        best=ranked[0] if ranked and not several else None,
        front=len(ranked) if several else 0,
        seconds_left=seconds_left,
        epochs_saved=sum(
            run_of(trial).get("epochs", 0) - run_of(trial).get("last_epoch", 0)
            for trial in trials
            if trial.state == TrialState.PRUNED
        ),
        epochs=sum(run_of(trial).get("last_epoch") or 0 for trial in trials),
    )


def best_first(ledger: Ledger) -> list[FrozenTrial]:
    """Completed trials within their constraints, best first; under several objectives the Pareto front.

    Ties go to the lower validation loss, as among a run's epochs: accuracies of small sets tie often. Runs that
    diverged are not among them: their figure stands for the worst and was not measured.
    """
    good = [
        trial
        for trial in ledger.trials()
        if trial.state == TrialState.COMPLETE
        and run_of(trial).get("status") == "completed"
        and all(value <= 0 for value in trial.constraints.values())
    ]
    signs = [-1 if direction == StudyDirection.MAXIMIZE else 1 for direction in ledger.study.directions]

    def cost(trial: FrozenTrial) -> tuple[float, ...]:
        return tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))

    if len(signs) > 1:
        good = [one for one in good if not any(_dominates(cost(other), cost(one)) for other in good)]
    return sorted(good, key=lambda trial: (cost(trial), run_of(trial).get("val_loss", math.inf), trial.number))


def trial_line(trial: FrozenTrial, ledger: Ledger) -> str:
    """What became of a trial, and where the study stands."""
    run = run_of(trial)
    shown = " ".join(f"{key}={_short(value)}" for key, value in (trial.user_attrs.get("setting") or {}).items())
    values = "" if trial.values is None else "  " + ", ".join(f"{value:.6g}" for value in trial.values)
    line = f"trial {trial.number} {run.get('status', trial.state.name.lower())}{values}  {shown}"
    if "error" in run:
        line += f"  ({run['error'].splitlines()[0]})"
    return f"{line}\n{standing(ledger).in_words()}"


def table(ledger: Ledger, most: int | None = None) -> Group:
    """The study in a table: its standing, then all trials, or at most so many: those that run and the latest ended."""
    where = standing(ledger)
    rows = Table(box=None, pad_edge=False)
    for head in ("trial", "state", "value", "epochs", "seconds", "host", "setting"):
        numeric = head in ("trial", "value", "epochs", "seconds")
        rows.add_column(head, justify="right" if numeric else "left", no_wrap=True, overflow="ellipsis")
    trials = ledger.trials()
    names = _short_names({key for trial in trials for key in trial.user_attrs.get("setting") or {}})
    running = [trial for trial in trials if trial.state == TrialState.RUNNING]
    ended = sorted((t for t in trials if t.state.is_finished()), key=lambda t: t.datetime_complete)
    shown = [*ended[-LATEST:], *running][-most:] if most else trials
    for trial in shown:
        run, best = run_of(trial), where.best is not None and trial.number == where.best.number
        progress = trial.user_attrs.get("progress")
        epochs = run.get("last_epoch", "")
        value = trial.values
        if trial.state == TrialState.RUNNING and progress:
            epochs, value = f"{progress['epoch']}/{progress['epochs']}", progress["value"]
        elif value is None:
            value = trial.intermediate_values.get(max(trial.intermediate_values, default=None))
        rows.add_row(
            str(trial.number),
            run.get("status", trial.state.name.lower()) if trial.state.is_finished() else trial.state.name.lower(),
            "" if value is None else ", ".join(f"{v:.4g}" for v in (value if isinstance(value, list) else [value])),
            str(epochs),
            f"{_seconds(trial):.0f}",
            (trial.user_attrs.get("lease") or {}).get("host", "").split("/")[0],
            " ".join(f"{names[key]}={_short(value)}" for key, value in (trial.user_attrs.get("setting") or {}).items()),
            style="bold" if best else "dim" if trial.state.is_finished() else "",
        )
    return Group(Text(f"study {where.name}: {where.in_words()}"), rows)


@contextmanager
def board(ledger: Ledger) -> Iterator[None]:
    """Inside, the table stands at the foot of the terminal. Elsewhere nothing does: the log has lines."""
    if not sys.stdout.isatty():
        yield
        return
    console = rich.get_console()
    looked, shown = -LOOK_EVERY_S, Text("")

    def render() -> Group | Text:
        nonlocal looked, shown
        if time.monotonic() - looked > LOOK_EVERY_S:
            try:
                shown = table(ledger, max(console.height - AROUND, 1))
            except Exception as error:  # a database that restarts must not take the training down with it
                shown = Text(f"the study cannot be read: {error}")
            looked = time.monotonic()
        return shown

    try:
        with Live(get_renderable=render, console=console, refresh_per_second=2):
            try:
                yield
            finally:
                looked = -LOOK_EVERY_S  # the last look stays on the terminal
    finally:
        for handler in logging.getLogger().handlers:  # jobs made theirs while the table stood below
            if isinstance(handler, logging.StreamHandler) and isinstance(handler.stream, FileProxy):
                handler.setStream(sys.stdout)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes > 1 else f"{60 * minutes + seconds} s"


def _seconds(trial: FrozenTrial) -> float:
    if trial.datetime_start is None:
        return 0.0
    return ((trial.datetime_complete or datetime.now()) - trial.datetime_start).total_seconds()


def _dominates(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    return left != right and all(a <= b for a, b in zip(left, right, strict=True))


def _short_names(keys: set[str]) -> dict[str, str]:
    """Each key's shortest ending that no other key shares."""
    found = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        others = keys - {key}
        found[key] = next((e for e in endings if not any(f".{o}".endswith(f".{e}") for o in others)), key)
    return found


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
