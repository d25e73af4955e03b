"""The rules of a study: which trial is next, whose it is, and when it is somebody else's.

The storage is the truth and every process a replaceable worker. A trial is one row for good: a worker that dies leaves
its row RUNNING, the next one that notices makes it WAITING again, and whoever takes it goes on from its checkpoint,
in the same folder. So n_trials is the number of rows, whatever was killed on the way.

What a row carries besides Optuna's own columns, as user attributes:

setting   the swept overrides, {key: value}
control   true for the arm without regularization, which the sampler never sees
lease     whose it is: {token, started, host, pid, lock, retries}; set whenever a worker takes the row
beat      a count that rises while the trial's process lives
progress  {epoch, epochs, value}: how far it has come
run       what became of it: status, folder, wandb id, figures, error
"""

import functools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from brqat.study.storage import Storage, patiently

log = logging.getLogger(__name__)

SILENT_BEATS = 3  # without which a trial's process is taken for dead
SAME_FAILURES = 3  # that end a study in which nothing else has happened
LOCK_NAME = ".trial.lock"  # in a trial's folder, held by its process


class NotOurs(Exception):
    """The trial belongs to another worker now, or is over."""


@dataclass(frozen=True)
class Rules:
    """hydra.sweeper's keys of the same names."""

    n_trials: int
    heartbeat_s: float
    max_retry: int
    max_failures: int
    max_failure_rate: float = 1.0

    def __post_init__(self):
        for key, least in (("n_trials", 1), ("max_retry", 0), ("max_failures", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"hydra.sweeper.{key}={value!r} cannot be: write a whole number, {least} or more.")
        beat, rate = self.heartbeat_s, self.max_failure_rate
        if isinstance(beat, bool) or not isinstance(beat, (int, float)) or beat <= 0:
            raise ValueError(f"hydra.sweeper.heartbeat_s={beat!r} cannot be: write seconds, above 0.")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
            raise ValueError(f"hydra.sweeper.max_failure_rate={rate!r} cannot be: write a share, 0 to 1.")


@dataclass(frozen=True)
class Asked:
    """A trial that this worker is to run."""

    number: int
    token: str  # of its lease
    setting: dict[str, Any]


@dataclass(frozen=True)
class Space:
    """What is searched."""

    distributions: dict[str, BaseDistribution]
    controls: list[dict[str, Any]]  # settings of the arm without regularization
    grid: list[dict[str, Any]] | None = None  # all settings, where the sampler is the grid's
    extend: Callable[[optuna.Trial], None] | None = None  # hydra.sweeper.custom_search_space


class Ledger:
    """A study in its storage, and the moves a worker may make. Raises KeyError if the study does not exist."""

    def __init__(self, storage: Storage, name: str, rules: Rules | None = None, pruner=None):
        self.storage, self.name, self.rules = storage, name, rules
        self.study = optuna.Study(name, storage.optuna, optuna.samplers.RandomSampler(), pruner)
        self._heard: dict[int, tuple[Any, float]] = {}  # number -> last sign of life, and when we saw it change

    # ---- reading

    def trials(self) -> list[FrozenTrial]:
        """All rows, in order of their numbers."""
        return self.study.get_trials(deepcopy=False)

    def row(self, number: int) -> FrozenTrial:
        return self.storage.optuna.get_trial(self._id(number))

    @property
    def attrs(self) -> dict[str, Any]:
        return self.study.user_attrs

    # ---- taking a trial

    def enqueue(self, settings: list[dict[str, Any]], **attrs) -> None:
        """Adds waiting rows for the settings that the study does not have yet, as far as n_trials allows."""
        known = [trial.user_attrs.get("setting") for trial in self.trials()]
        for setting in settings:
            if setting not in known and len(known) < self.rules.n_trials:
                self.study.enqueue_trial(setting, user_attrs={"setting": setting, **attrs})
                known.append(setting)

    def next_trial(
        self, space: Space, make_sampler: Callable[[int], optuna.samplers.BaseSampler], queued: bool = False
    ) -> Asked | None:
        """A waiting row, or a new one while there are fewer than n_trials; None if there is nothing to take.

        make_sampler: of a sampler for the row of a number, so that workers differ and a repeat of a row does not.
        queued: the job may outlive this process before it starts.
        """
        with self.storage.exclusive() as check:
            self.requeue_dead()
            trials = self.trials()
            waiting = [trial.number for trial in trials if trial.state == TrialState.WAITING]
            if not waiting and len(trials) >= self.rules.n_trials:
                return None
            number = waiting[0] if waiting else len(trials)
            trial = _Searched(self.study, make_sampler(number)).ask()
            assert trial.number == number, "another process asks without the study's lock"
            if lease := dict(trial.user_attrs.get("lease", {})):  # of its last owner, and from here on nobody's
                lease.pop("reason", None)
                check()
                trial.set_user_attr("lease", lease | {"token": ""})
            setting = trial.user_attrs.get("setting")
            if setting is None:
                setting = {name: trial._suggest(name, space.distributions[name]) for name in space.distributions}
                if space.extend is not None:
                    space.extend(trial)
                    setting = dict(trial.params)
                trial.set_user_attr("setting", setting)
            else:  # a control's keys may lie outside of the space: lambda 0 on a logarithmic axis
                for name in setting.keys() & space.distributions.keys():
                    if _contains(space.distributions[name], setting[name]):
                        trial._suggest(name, space.distributions[name])
            check()
            return Asked(number, self._lease(trial, queued), setting)

    def requeue_dead(self) -> None:
        """Makes every row of a dead process WAITING. The caller holds the lock."""
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and (reason := self._dead(trial)):
                self._let_go(trial, reason, counts=True)

    def requeue(self, number: int, token: str, reason: str, counts: bool) -> None:
        """Makes a row WAITING if it is still ours. counts: against max_retry."""
        with self.storage.exclusive():
            trial = self.row(number)
            if trial.state == TrialState.RUNNING and trial.user_attrs["lease"]["token"] == token:
                self._let_go(trial, reason, counts)

    def is_out(self, batch: list[Asked]) -> bool:
        """Whether any of these trials is still running, or about to, under the lease that it was asked with."""
        with self.storage.exclusive():
            self.requeue_dead()
        rows = [(asked, self.row(asked.number)) for asked in batch]
        return any(
            row.state == TrialState.RUNNING and row.user_attrs["lease"]["token"] == asked.token for asked, row in rows
        )

    # ---- the process of a trial

    @contextmanager
    def claimed(self, number: int, token: str, folder: Path) -> Iterator[FrozenTrial]:
        """Inside, this process is the one that runs the row. Raises NotOurs."""
        file = folder / LOCK_NAME
        lock = FileLock(file)
        try:
            lock.acquire(timeout=2 * self.rules.heartbeat_s)
        except Timeout:  # its owner was silent and lives
            self.requeue(number, token, f"another process holds {file}", counts=False)
            raise NotOurs(f"another process holds {file}") from None
        try:
            self._claim(number, token, file)
            yield self.row(number)
        finally:
            lock.release()

    @patiently
    def _claim(self, number: int, token: str, file: Path) -> None:
        with self.storage.exclusive():
            trial = self.row(number)
            lease = dict(trial.user_attrs["lease"])
            if trial.state.is_finished() or lease["token"] != token:
                raise NotOurs(f"trial {number} went to another worker while this one waited to start")
            if trial.state == TrialState.WAITING:  # given back, and nobody has taken it: a requeued batch job
                self.storage.optuna.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            here = {"started": True, "host": host(), "pid": os.getpid(), "lock": _identity(file)}
            lease.pop("reason", None)
            self._set(trial, "lease", lease | here | {"folder": str(file.parent)})

    def beat(self, number: int, token: str, progress: dict | None = None) -> None:
        """A sign of life, with the epoch that the trial has come to. Raises NotOurs."""
        trial = self._ours(number, token)
        self._set(trial, "beat", trial.user_attrs.get("beat", 0) + 1)
        if progress:
            self._set(trial, "progress", progress)

    @patiently
    def tell(
        self,
        number: int,
        token: str,
        run: dict,
        state: TrialState,
        values: list[float] | None,
        constraints: dict[str, float],
        sampler: optuna.samplers.BaseSampler,
    ) -> None:
        """Ends a row, and lets the sampler know where the trial is told. Raises NotOurs.

        Under the lock: whoever looks for the dead must not see the row running and its process gone.
        """
        with self.storage.exclusive():
            trial = self._ours(number, token)
            self._set(trial, "run", run)
            for name, value in constraints.items():
                if name not in trial.constraints:  # a worker may have died between the two
                    optuna.Trial(self.study, trial._trial_id).set_constraint(name, value)
            _Searched(self.study, sampler).tell(number, values, state)

    @patiently
    def report(self, number: int, token: str, step: int, value: float) -> bool:
        """Notes an intermediate value; whether the pruner gives the row up. Raises NotOurs."""
        known = self._ours(number, token)
        trial = optuna.Trial(self.study, known._trial_id)
        if step not in known.intermediate_values:  # a killed worker may have come as far
            trial.report(value, step)
        return not is_control(known) and trial.should_prune()

    # ---- failures

    def failure(self, since: datetime) -> str | None:
        """Why the study should stop, judged by what ended after `since`; None if it should not."""
        ended = [t for t in self.trials() if t.state.is_finished() and t.datetime_complete >= since]
        bad = [t for t in ended if run_of(t).get("status") in ("failed", "diverged")]
        # A combination that was warned of when the study began says nothing of the others.
        expected = {_kind(why) for why in self.attrs.get("doubts", [])}
        bad = [t for t in bad if _kind(run_of(t).get("error", "")) not in expected]
        failed = [t for t in bad if t.state == TrialState.FAIL]
        if len(failed) > self.rules.max_failures:
            return f"{len(failed)} trials failed, more than hydra.sweeper.max_failures={self.rules.max_failures}"
        if len(failed) > self.rules.max_failure_rate * max(len(ended), SAME_FAILURES):
            rate = self.rules.max_failure_rate
            return f"{len(failed)} of {len(ended)} trials failed, more than hydra.sweeper.max_failure_rate={rate}"
        # The arm without regularization may work where nothing else does.
        searched = [t for t in ended if not is_control(t)]
        failed = [t for t in failed if not is_control(t)]
        for ones, broken, which in ((ended, bad, "trial"), (searched, failed, "trial but the controls")):
            kinds = {_kind(run_of(t).get("error", "")) for t in broken}
            if len(broken) == len(ones) >= SAME_FAILURES and len(kinds) == 1:
                said = run_of(broken[-1]).get("error")
                return f"every {which} fails the same way, {len(broken)} of {len(ones)}: {said}"
        return None

    # ---- the parts

    def _ours(self, number: int, token: str) -> FrozenTrial:
        trial = self.row(number)
        if trial.state != TrialState.RUNNING or trial.user_attrs["lease"]["token"] != token:
            raise NotOurs(f"trial {number} was taken for dead and went to another worker")
        return trial

    def _lease(self, trial: optuna.Trial, queued: bool) -> str:
        token = secrets.token_hex(4)
        before = trial.user_attrs.get("lease", {})
        lease = {"token": token, "started": False, "queued": queued, "host": host(), "pid": os.getpid(), "lock": None}
        trial.set_user_attr("lease", lease | {"retries": before.get("retries", 0)})
        return token

    def _dead(self, trial: FrozenTrial) -> str | None:
        """Why the row's process is taken for dead, None if it is not.

        On one host the lock in its folder decides, and before there is one, its process. Elsewhere silence does,
        measured by our own clock: how long ago we saw the count of its beats change.
        """
        lease = trial.user_attrs.get("lease")
        if lease is None or not lease["token"]:
            return "its worker died while it asked"  # asking is done under the lock, which we hold
        if lease["started"] and lease["host"] == host():
            held = _held(Path(lease["folder"]) / LOCK_NAME, lease["lock"])
            if held is not None:
                return None if held else f"process {lease['pid']} is gone"
        if not lease["started"] and not lease["queued"] and lease["host"] == host() and not _lives(lease["pid"]):
            return f"process {lease['pid']} is gone before it began"
        sign = (lease["token"], lease["started"], trial.user_attrs.get("beat"))
        last, since = self._heard.get(trial.number, (None, 0.0))
        if sign != last:
            self._heard[trial.number] = (sign, time.monotonic())
            return None
        silent = time.monotonic() - since
        return f"silent for {silent:.0f} s" if silent > SILENT_BEATS * self.rules.heartbeat_s else None

    def _let_go(self, trial: FrozenTrial, reason: str, counts: bool) -> None:
        lease = trial.user_attrs.get("lease", {})
        # A reason stands in a lease that was given up; a worker that died between the two writes counted it already.
        retries = lease.get("retries", 0) + (counts and "reason" not in lease)
        if retries > self.rules.max_retry:
            error = f"killed {retries} times, more than hydra.sweeper.max_retry={self.rules.max_retry} ({reason})"
            self._set(trial, "run", {"status": "failed", "error": error, "folder": lease.get("folder")})
            self.storage.optuna.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            log.warning("trial %d: %s", trial.number, error)
            return
        lease = {"token": "", "started": False} | lease | {"retries": retries, "reason": reason}
        self._set(trial, "lease", lease)
        self.storage.optuna.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        self._heard.pop(trial.number, None)
        log.warning("trial %d waits for a worker again: %s", trial.number, reason)

    def _set(self, trial: FrozenTrial, key: str, value: Any) -> None:
        self.storage.optuna.set_trial_user_attr(trial._trial_id, key, value)

    def _id(self, number: int) -> int:
        return self.storage.optuna.get_trial_id_from_study_id_trial_number(self.study._study_id, number)


class _Searched(optuna.Study):
    """The study as its sampler may see it: without controls, which lie outside of the space that it searches.

    Without its pruner, too: for Hyperband, Optuna would show a sampler the whole study instead of this one.
    """

    def __init__(self, study: optuna.Study, sampler: optuna.samplers.BaseSampler):
        super().__init__(study.study_name, study._storage, sampler, optuna.pruners.NopPruner())

    def _get_trials(self, deepcopy=True, states=None, use_cache=False) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, states, use_cache)
        return [trial for trial in trials if not is_control(trial)]


def run_of(trial: FrozenTrial) -> dict:
    """What became of a row's run; empty while it has not ended."""
    return trial.user_attrs.get("run") or {}


def is_control(trial: FrozenTrial) -> bool:
    """Whether a row belongs to the arm without regularization."""
    return bool(trial.user_attrs.get("control"))


@functools.cache
def host() -> str:
    """This machine, this start of it, and the container in which its processes have their numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = numbers = ""
    return f"{socket.gethostname()}/{boot}/{numbers}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _held(file: Path, identity: list[int]) -> bool | None:
    """Whether a process holds the lock; None where this is not the file that it locked (another file system)."""
    if _identity(file) != identity:
        return None
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _identity(file: Path) -> list[int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return [stat.st_dev, stat.st_ino]


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:
        return False


def _kind(error: str) -> str:
    """An error without its numbers, which differ from setting to setting."""
    return "".join(character for character in error.removeprefix("ValueError: ") if not character.isdigit())[:200]
