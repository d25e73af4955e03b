"""One worker of a study: opens it, asks for a trial, launches it, sees what became of it, until nothing is left."""

import functools
import itertools
import json
import logging
import os
import re
import secrets
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.utils import get_method
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import check_distribution_compatibility
from optuna.pruners import NopPruner
from optuna.trial import TrialState

from brqat.provenance import source_hash
from brqat.settings import OBJECTIVES, what_determines
from brqat.study import results
from brqat.study.board import board, trial_line
from brqat.study.ledger import Asked, Ledger, Space
from brqat.study.rehearsal import rehearse
from brqat.study.space import controls_of, description, difference, overrides_of
from brqat.study.storage import Storage, is_away, is_full, open_storage
from brqat.study.trial import constraint_values, open_ledger, pruner_of, rules_of, sampler_of

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0  # at other workers' trials, while there is nothing to run
GRACE_S = 15.0  # that a batch job has for coming back, once its trial is over or somebody else's


class Worker:
    """What `brqat -m hydra/sweeper=study ...` does. What cannot work is refused before anything is trained."""

    def __init__(self, config: DictConfig, config_loader, launcher: Launcher):
        self.config, self.config_loader, self.launcher = config, config_loader, launcher
        self.sweeper = config.hydra.sweeper
        self.folder = Path(config.hydra.sweep.dir).absolute()
        # Submitit's launcher composes nothing here, so that one thread per job may wait: others run as a batch.
        self.threaded = "submitit" in config.hydra.launcher._target_
        self.local = "basic" in config.hydra.launcher._target_
        self.on_this_machine = self.local or "joblib" in config.hydra.launcher._target_
        self.began = datetime.now()
        self.said: set[int] = set()  # numbers of the trials whose end has been told

    def work(self, arguments: list[str]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        n_jobs = self.sweeper.n_jobs
        try:
            self.space, self.fixed = self._read(arguments)
            with _machine_at_fault_said(users=ValueError):
                self.ledger = self._open()
        except ValueError as error:  # the user's: a sentence, not a traceback
            if "HYDRA_FULL_ERROR" in os.environ:
                raise
            log.error("brqat: %s", error)
            raise SystemExit(2) from None
        self.said = {trial.number for trial in self.ledger.trials() if trial.state.is_finished()}
        log.info("study %s in %s", self.ledger.name, self.ledger.storage.where)
        with _machine_at_fault_said(), _sigterm_ends(), board(self.ledger):
            try:
                if self.threaded and n_jobs > 1:
                    self._in_threads(n_jobs)
                else:
                    self._loop(n_jobs)
            finally:
                self._say_ended()
                with self.ledger.storage.exclusive():
                    results.write(self.ledger, self.folder)
            log.info("%s", results.verdict(self.ledger, self.folder))
            if results.came_to_nothing(self.ledger):
                raise SystemExit(1)

    # ---- before the first trial

    def _read(self, arguments: list[str]) -> tuple[Space, list[str]]:
        """The space, and the overrides that all trials share."""
        if isinstance(self.sweeper.sampler, str):
            raise ValueError(
                f"hydra.sweeper.sampler={self.sweeper.sampler} is a word where its settings stand: write "
                f"hydra/sweeper/sampler={self.sweeper.sampler} (tpe, random, grid, nsgaii, nsgaiii, cmaes, gp or qmc)."
            )
        params = [f"{key}={value}" for key, value in (self.sweeper.params or {}).items()]
        distributions, fixed, deletions = create_params_from_overrides(params + arguments)
        plain = {name.lstrip("+") for name in fixed}
        distributions = {name: d for name, d in distributions.items() if name.lstrip("+") not in plain}
        is_grid = self.sweeper.sampler._target_.endswith("GridSampler")
        if "seed" in distributions and not is_grid:
            raise ValueError(
                "seed is not something to search: the best of several seeds is the luckiest. Leave it out, and run the "
                "best settings with more seeds afterwards: brqat-study confirm FOLDER."
            )
        overrides = [*(f"{name}={value}" for name, value in fixed.items()), *deletions]
        extend = None
        if self.sweeper.custom_search_space:
            upstream = OptunaSweeperImpl(None, None, None, None, 1, 1, 1.0, self.sweeper.custom_search_space, None)
            extend = functools.partial(upstream.custom_search_space_extender, self.config)
        elif not distributions:
            raise ValueError(
                "hydra/sweeper=study has nothing to search. Choose sweep=lambda_bits, or give ranges such as "
                "'regularizer.lambda_br=tag(log,interval(0.1,100))'."
            )
        grid = None
        if is_grid:
            names = list(distributions)
            values = [OptunaSweeperImpl._to_grid_sampler_choices(distributions[name]) for name in names]
            grid = [dict(zip(names, row, strict=True)) for row in itertools.product(*values)]
        controls = controls_of(self.sweeper.control, distributions, plain)
        return Space(distributions, controls, grid, extend), overrides

    def _open(self) -> Ledger:
        """Creates the study, or makes sure that it is the one this command means."""
        n_jobs = self.sweeper.n_jobs
        if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1:
            raise ValueError(f"hydra.sweeper.n_jobs={n_jobs!r} cannot be: write a whole number, 1 or more.")
        base = self._composed({})
        objective = self._objective(base)
        constraint_values(self.sweeper.constraints, {})
        constraints = OmegaConf.to_container(self.sweeper.constraints or OmegaConf.create({}))
        here = description(self.space.distributions, self.space.controls, constraints, objective, what_determines(base))
        self._warn_of_a_password()
        rules_of(self.sweeper)
        pruner = pruner_of(self.sweeper.pruner)
        sampler_of(self.sweeper.sampler, 0)
        if not isinstance(pruner, NopPruner) and list(objective) not in (["val_acc"], ["val_loss"]):
            raise ValueError(
                f"{type(pruner).__name__} compares epochs by val_acc or val_loss, and objective={list(objective)}: "
                "write hydra/sweeper/pruner=none."
            )
        there = self._description_there()
        begins = there is None or (self.sweeper.force and there != here)
        doubts = self._try_out() if begins else []
        storage = open_storage(self.sweeper.storage, self.folder)  # nothing is left behind by what was refused above
        with storage.exclusive():
            self._create_or_check(storage, here, list(objective.values()), doubts)
            ledger = open_ledger(self.sweeper, self.folder)
            ledger.enqueue(self.space.controls, control=True)
            if self.space.grid is not None:
                ledger.enqueue(self.space.grid)
                # No more than these: another trial would repeat one.
                ledger.rules = replace(ledger.rules, n_trials=min(ledger.rules.n_trials, len(ledger.trials())))
        return ledger

    def _composed(self, setting: Mapping[str, Any]) -> DictConfig:
        """The configuration that a trial with this setting would have."""
        overrides = overrides_of(setting)
        try:
            return self.config_loader.load_sweep_config(self.config, [*self.fixed, *overrides])
        except HydraException as error:
            raise ValueError(f"{' '.join(overrides)}: no trial could be composed: {error}") from error

    def _try_out(self) -> list[str]:
        """Has hydra.sweeper.check make what the space describes; what can be said against settings in it.

        Raises ValueError where a trial would only find out what can be known now.
        """
        if self.sweeper.check is None or self.space.extend is not None:
            return []  # a custom_search_space draws what it likes
        try:
            # Jobs of a cluster may see a disk that this machine does not.
            check = get_method(self.sweeper.check)(with_data=self.on_this_machine, with_device=self.local)
        except Exception as error:
            raise ValueError(f"hydra.sweeper.check={self.sweeper.check} cannot be called: {error}") from error
        known: dict[tuple, str | None] = {}

        def why_not(setting: Mapping[str, Any]) -> str | None:
            key = tuple(sorted(overrides_of(setting)))
            if key not in known:
                known[key] = _why_not(check, self._composed, setting)
            return known[key]

        found = rehearse(self.space.distributions, self.space.controls, why_not)
        if found.refused:
            raise ValueError(f"{found.refused} (found by hydra.sweeper.check; null leaves it out)")
        for setting, why in found.doubtful:
            log.warning("trials such as %s will fail: %s", setting, why)
        return [why for _, why in found.doubtful]

    def _warn_of_a_password(self) -> None:
        literal = not OmegaConf.is_interpolation(self.sweeper, "storage")
        if literal and re.search("//[^/@:]*:[^/@]+@", str(self.sweeper.storage)):
            log.warning(
                "the password in hydra.sweeper.storage stands in every trial's .hydra/hydra.yaml and on a dashboard; "
                "better: PGPASSWORD, ~/.pgpass, or hydra.sweeper.storage='${oc.env:BRQAT_STORAGE}'"
            )

    def _objective(self, base: DictConfig) -> dict[str, str]:
        """Name -> direction. hydra.sweeper.direction may be left out; if given, it must be what the objective means."""
        names = base.objective
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(f"objective={name!r} is not known. Write one of {', '.join(OBJECTIVES)}.")
        meant = {name: OBJECTIVES[name].direction for name in names}
        given = self.sweeper.direction
        if given is not None:
            given = [given] if not OmegaConf.is_list(given) else list(given)
            given = [getattr(direction, "name", direction) for direction in given]
            if given != list(meant.values()):
                raise ValueError(
                    f"hydra.sweeper.direction={given} contradicts objective={names}, which asks for "
                    f"{list(meant.values())}. Leave hydra.sweeper.direction out."
                )
        return meant

    def _description_there(self) -> dict[str, str] | None:
        """Of the study, if it has begun: what it searches was tried out then."""
        try:
            storage = open_storage(self.sweeper.storage, self.folder, create=False)
        except ValueError:  # absent; what else is wrong with it is said when it is opened
            return None
        for study in storage.optuna.get_all_studies():
            if study.study_name == self.sweeper.study_name:
                return study.user_attrs.get("description")
        return None

    def _create_or_check(
        self, storage: Storage, here: dict[str, str], directions: list[str], doubts: list[str]
    ) -> None:
        name = self.sweeper.study_name
        names = [study.study_name for study in storage.optuna.get_all_studies()]
        if name not in names:
            runs = [*self.folder.glob("*/summary.json"), *self.folder.glob("*/last.pt")]
            left = sorted({path.parent.name for path in runs if path.parent.name.isdigit()})
            if left:
                raise ValueError(
                    f"{self.folder} holds runs ({', '.join(left[:5])}{', ...' if len(left) > 5 else ''}) but "
                    f"{storage.where} has no study {name}: new trials would mix with them. Move the folder away, give "
                    "the storage that belongs to it, or another hydra.sweeper.study_name."
                )
        study = optuna.create_study(
            study_name=name,
            storage=storage.optuna,
            directions=directions if name not in names else None,
            load_if_exists=True,
        )
        attrs = study.user_attrs
        lines = difference(attrs.get("description", here), here)
        if lines and (not self.sweeper.force or attrs["description"]["objective"] != here["objective"]):
            raise ValueError(
                f"study {name} in {storage.where} was begun with other settings, and its trials would not compare with "
                "this command's. From the study's (-) to this command's (+):\n" + "\n".join(lines) + "\n"
                "Give the settings it began with, another hydra.sweeper.study_name, or hydra.sweeper.force=true to mix "
                "(not for another objective)."
            )
        if lines:
            self._refuse_other_choices(study)
        # Nothing is written before this: a command that is refused leaves the study as it was.
        if attrs.get("n_trials") != self.sweeper.n_trials:
            study.set_user_attr("n_trials", self.sweeper.n_trials)  # for brqat-study status
        if "uid" not in attrs:
            study.set_user_attr("uid", secrets.token_hex(4))
            study.set_user_attr("code", source_hash())
        if doubts:
            study.set_user_attr("doubts", [*attrs.get("doubts", []), *doubts])
        if "description" not in attrs:
            study.set_user_attr("description", here)
            return
        if lines:
            log.warning(
                "hydra.sweeper.force=true: trials from here on differ from those before in\n%s", "\n".join(lines)
            )
            study.set_user_attr("forced", [*attrs.get("forced", []), lines])
            study.set_user_attr("description", here)
        if attrs.get("code") != source_hash():
            log.warning("this study began with another version of brqat's code; its later trials may differ for that")

    def _refuse_other_choices(self, study: optuna.Study) -> None:
        for trial in study.get_trials(deepcopy=False):
            for name in trial.distributions.keys() & self.space.distributions.keys():
                try:
                    check_distribution_compatibility(trial.distributions[name], self.space.distributions[name])
                except ValueError as error:
                    raise ValueError(
                        f"Optuna cannot mix the old and the new values of {name} in one study, and force=true cannot "
                        f"change that: {error} Give another hydra.sweeper.study_name."
                    ) from error

    # ---- trials

    def _loop(self, size: int) -> None:
        """Runs trials, `size` at once, until none is left; waits for those of other workers, in case one dies."""
        if self.local:
            size = 1  # one after the other anyway: none is to be kept from other workers
        waiting = False
        while True:
            batch = self._ask(size)
            if batch:
                waiting = False
                self._launch(batch)
                self._stop_if_failing()
            elif running := self._running():
                if not waiting:
                    log.info("waiting for trial %s of other workers, in case one dies", ", ".join(map(str, running)))
                waiting = True
                time.sleep(min(LOOK_EVERY_S, self.sweeper.heartbeat_s))
                self._say_ended()
            else:
                return

    def _in_threads(self, count: int) -> None:
        """A thread per job, so that a short trial is followed at once by the next."""
        ends: list[BaseException | None] = []

        def loop() -> None:
            try:
                self._loop(1)
                ends.append(None)
            except BaseException as error:
                ends.append(error)

        threads = [threading.Thread(target=loop, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        while len(ends) < count and not any(ends):
            time.sleep(0.2)  # Ctrl-C comes through here: jobs in the queue go on and tell the study themselves
        for error in filter(None, ends):
            raise error

    def _ask(self, size: int) -> list[Asked]:
        batch: list[Asked] = []
        sampler = functools.partial(sampler_of, self.sweeper.sampler)
        while len(batch) < size and (asked := self.ledger.next_trial(self.space, sampler, queued=not self.local)):
            batch.append(asked)
        return batch

    def _launch(self, batch: list[Asked]) -> None:
        errors: list[BaseException] = []
        broken = False
        with self._beating(batch):
            try:
                returns = self._returns(batch)
                errors = [job._return_value for job in returns if job.status == JobStatus.FAILED]
            except HydraException as error:  # a setting that cannot be composed: no trial began
                if len(batch) > 1:
                    raise
                self._fail(batch[0], error)
            except Exception as error:  # a job that never came back: killed, cancelled, its machine gone
                errors, broken = [error], len(batch) > 1
            except BaseException:
                for asked in () if self.threaded else batch:  # their processes end with this one
                    self.ledger.requeue(asked.number, asked.token, "interrupted", counts=False)
                raise
            blameless = any(is_full(error) or _is_refused(error) for error in errors)
            # Which job it was the launcher does not say, and the others may run on: their locks and beats tell.
            for asked in self._not_started(batch) if broken else batch:
                reason = f"its job ended without a word ({errors[0]})" if errors else "its job ended without a word"
                with suppress(*([Exception] if blameless else [])):  # the study may lie on the disk that is full
                    self.ledger.requeue(asked.number, asked.token, reason, counts=not blameless)
        for error in errors:
            if is_full(error):
                raise error
            if _is_refused(error):
                log.error("no job can be submitted: %s", error)
                raise SystemExit(1)
        self._say_ended()

    def _returns(self, batch: list[Asked]) -> Sequence[JobReturn]:
        """What the launcher returns. The job of a batch system is not waited for once its trial is out of its hands:

        the system may tell minutes later that a job was cancelled, or, without accounting, never.
        """
        overrides = [self._overrides(asked) for asked in batch]
        if not self.threaded:
            return self.launcher.launch(overrides, batch[0].number)
        came: list[Sequence[JobReturn] | BaseException] = []

        def launch() -> None:
            try:
                came.append(self.launcher.launch(overrides, batch[0].number))
            except BaseException as error:
                came.append(error)

        thread = threading.Thread(target=launch, daemon=True)
        thread.start()
        while not came:
            thread.join(self.sweeper.heartbeat_s)
            with suppress(Exception):  # a database that restarts
                if not self.ledger.is_out(batch):
                    thread.join(GRACE_S)
                    break
        if not came:
            return []
        if isinstance(came[0], BaseException):
            raise came[0]
        return came[0]

    def _fail(self, asked: Asked, error: Exception) -> None:
        run = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        sampler = sampler_of(self.sweeper.sampler, asked.number)
        self.ledger.tell(asked.number, asked.token, run, TrialState.FAIL, None, {}, sampler)

    def _not_started(self, batch: list[Asked]) -> list[Asked]:
        return [asked for asked in batch if not self.ledger.row(asked.number).user_attrs["lease"]["started"]]

    def _overrides(self, asked: Asked) -> list[str]:
        return [
            *self.fixed,
            *overrides_of(asked.setting),
            f"+trial.number={asked.number}",
            f"+trial.lease='{asked.token}'",
            f"+trial.pooled={json.dumps(not self.local and not self.threaded)}",
            "resume=true",
            f"hydra.sweep.dir={json.dumps(str(self.folder))}",
            f"hydra.sweep.subdir={asked.number}",
        ]

    @contextmanager
    def _beating(self, batch: list[Asked]) -> Iterator[None]:
        """Signs of life for jobs that wait in a queue; a job that has started gives its own."""
        if self.local:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.sweeper.heartbeat_s):
                for asked in batch:
                    with suppress(Exception):
                        if not self.ledger.row(asked.number).user_attrs["lease"]["started"]:
                            self.ledger.beat(asked.number, asked.token)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()

    # ---- what became of them

    def _running(self) -> list[int]:
        return [trial.number for trial in self.ledger.trials() if trial.state == TrialState.RUNNING]

    def _say_ended(self) -> None:
        """A line for each trial that has ended since the last look, whoever ran it."""
        trials = self.ledger.trials()
        for trial in trials:
            if trial.state.is_finished() and trial.number not in self.said:
                self.said.add(trial.number)
                log.info("%s", trial_line(trial, self.ledger))

    def _stop_if_failing(self) -> None:
        reason = self.ledger.failure(self.began)
        if reason:
            log.error("the study stops: %s", reason)
            raise SystemExit(1)


def _why_not(check: Callable, compose: Callable, setting: Mapping[str, Any]) -> str | None:
    try:
        config = compose(setting)
        check(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    except Exception as error:  # of whatever kind: a trial would end with it
        if is_full(error):
            raise
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None


def _is_refused(error: BaseException) -> bool:
    """Whether submitit could not submit a job at all: a partition that does not exist, say."""
    return any(frame.name == "_submit_command" for frame in traceback.extract_tb(error.__traceback__))


@contextmanager
def _machine_at_fault_said(users: type[Exception] | tuple = ()) -> Iterator[None]:
    """Inside, a full disk or an absent database ends the worker with a sentence, wherever it was met.

    users: what is the user's fault instead, such as an address that cannot be.
    """
    try:
        yield
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else repr(error)
        if isinstance(error, users) and not is_full(error):
            raise
        if is_full(error):
            log.error("the disk is full (%s). Nothing is lost: make room and give the same command again.", said)
        elif is_away(error):
            log.error("the storage is away (%s). Nothing is lost: give the same command again.", said)
        else:
            raise
        raise SystemExit(1) from None


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """Between trials SIGTERM ends the worker as Ctrl-C does, with its results written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, _frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
