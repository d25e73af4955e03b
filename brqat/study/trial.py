"""The job's side of a trial: claims its row, gives signs of life, reports epochs, and tells what became of it.

The job tells, not the controller that launched it: a batch job goes on after its controller was killed.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from brqat.files import config_dir
from brqat.study.ledger import Ledger, NotOurs, Rules
from brqat.study.storage import is_away, is_full, open_storage
from brqat.tracking.files import Identity

log = logging.getLogger(__name__)

SAMPLERS = ("optuna.samplers.*", "hydra_plugins.hydra_optuna_sweeper.*", "brqat.*")
# What of a run's summary stands in its row.
FIGURES = (
    "status", "error", "val_acc", "val_loss", "test_acc", "float_test_acc", "best_epoch", "last_epoch", "epochs",
    "seconds", "weight_bits", "act_bits", "weight_bytes", "bops", "seed", "device", "config_hash", "wandb_run_id",
)  # fmt: skip
NUMBERS = tuple(key for key in FIGURES if key not in ("status", "error", "device", "config_hash", "wandb_run_id"))
SHOW_EVERY_S = 5.0  # at most, a trial's progress in its row
NOT_MET = 1e18  # of a constraint on a figure that the run did not come to


@dataclass
class Trial:
    """A row of a study while this process runs it."""

    ledger: Ledger
    number: int
    token: str
    uid: str  # of the study
    prunes: bool
    lost: NotOurs | None = None  # that another worker has taken the row
    progress: dict = field(default_factory=dict)  # what a table shows of it while it runs

    @property
    def study_name(self) -> str:
        return self.ledger.name

    @property
    def identity(self) -> Identity:
        """How a dashboard knows the run."""
        name = f"{self.study_name}-{self.number}"
        return Identity(run_id=f"{self.uid}-{self.number}", name=name, group=self.study_name, job_type="trial")

    def came_to(self, epoch: int, epochs: int, value: float | None) -> None:
        """Notes an epoch, of so many, for whoever watches the study."""
        self.progress = {"epoch": epoch, "epochs": epochs, "value": value}

    def hopeless(self, step: int, value: float) -> bool:
        """Whether the pruner gives the trial up, having seen the value at this step. Raises NotOurs."""
        if self.lost is not None:
            raise self.lost
        return self.prunes and self.ledger.report(self.number, self.token, step, value)

    @property
    def forced(self) -> bool:
        """Whether the study has gone on with other settings than it began with."""
        return "forced" in self.ledger.attrs

    @contextmanager
    def beating(self) -> Iterator[None]:
        """A sign of life every heartbeat_s, and sooner when there is progress to show, from a thread."""
        over = threading.Event()
        every = self.ledger.rules.heartbeat_s

        def beat() -> None:
            last, shown = time.monotonic(), self.progress
            while not over.wait(max(0.0, min(SHOW_EVERY_S, last + every - time.monotonic()))):
                progress = self.progress
                if progress == shown and time.monotonic() - last < every:
                    continue
                last = time.monotonic()
                try:
                    self.ledger.beat(self.number, self.token, progress)
                    shown = progress
                except NotOurs as reason:
                    self.lost = reason
                    return
                except Exception as error:  # a database that restarts
                    log.warning("trial %d: no sign of life could be given (%s)", self.number, error)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def run_trial(run: Callable[[Trial], dict], node: DictConfig, sweeper: DictConfig, folder: Path) -> Any:
    """Runs a row of the study; returns the objective, or None if the row went to another worker.

    run: from the trial to what summary.json holds. node: {number, lease, pooled}, which the sweeper adds to the config.
    """
    ledger = open_ledger(sweeper, folder.parent)
    trial = Trial(ledger, node.number, node.lease, ledger.attrs["uid"], not isinstance(ledger.study.pruner, NopPruner))
    try:
        with ledger.claimed(trial.number, trial.token, folder), trial.beating():
            try:
                summary = run(trial)
            except NotOurs:
                raise
            except (SystemExit, KeyboardInterrupt) as error:
                ledger.requeue(trial.number, trial.token, "interrupted", counts=False)
                if node.get("pooled"):  # joblib's pool would hang on a SystemExit
                    raise RuntimeError(f"trial {trial.number} was interrupted: {error!r}") from None
                raise
            except Exception as error:
                if type(error).__name__ == "UncompletedJobError":  # submitit's: out of time, and not to be queued again
                    ledger.requeue(trial.number, trial.token, f"{error}", counts=True)
                    raise
                if is_full(error) or is_away(error):
                    with suppress(Exception):  # the study's file may lie on the same disk; its silence tells then
                        ledger.requeue(trial.number, trial.token, f"{error}", counts=False)
                    raise
                failed = {"status": "failed", "error": f"{type(error).__name__}: {error}", "folder": str(folder)}
                _tell(trial, sweeper, failed, TrialState.FAIL, None)
                raise
            objective = summary["objective"]
            values = [float(value) for value in (objective if isinstance(objective, (list, tuple)) else [objective])]
            told = {key: summary.get(key) for key in FIGURES} | {"folder": str(folder)}
            if summary["status"] == "pruned":
                _tell(trial, sweeper, told, TrialState.PRUNED, None)
            else:
                _tell(trial, sweeper, told, TrialState.COMPLETE, values)
            return objective
    except NotOurs as reason:
        log.warning("%s: nothing is left to do here", reason)
        return None


def _tell(trial: Trial, sweeper: DictConfig, run: dict, state: TrialState, values: list[float] | None) -> None:
    run = {key: value for key, value in run.items() if value is not None}
    constraints = constraint_values(sweeper.get("constraints"), run) if state == TrialState.COMPLETE else {}
    sampler = sampler_of(sweeper.sampler, trial.number)
    trial.ledger.tell(trial.number, trial.token, run, state, values, constraints, sampler)


def open_ledger(sweeper: DictConfig, folder: Path) -> Ledger:
    """The study that hydra.sweeper names; folder: the sweep's."""
    storage = open_storage(sweeper.storage, folder)
    return Ledger(storage, sweeper.study_name, rules_of(sweeper), pruner_of(sweeper.pruner))


def rules_of(sweeper: DictConfig) -> Rules:
    return Rules(
        sweeper.n_trials, sweeper.heartbeat_s, sweeper.max_retry, sweeper.max_failures, sweeper.max_failure_rate
    )


def pruner_of(node: DictConfig | str) -> BasePruner:
    """From hydra/sweeper/pruner=NAME, or from hydra.sweeper.pruner=NAME."""
    if isinstance(node, str):
        folder = Path(config_dir()) / "hydra/sweeper/pruner"
        file = folder / f"{node}.yaml"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise ValueError(f"hydra.sweeper.pruner={node} is not known. Write one of {known}.")
        node = OmegaConf.load(file)
    return instantiate(_alone(node), _execution_whitelist_=["optuna.pruners.*"])


def sampler_of(node: DictConfig, number: int) -> BaseSampler:
    """The sampler for the row of a number.

    Its seed is made of the config's and the number: workers differ and a repeat of a row does not. Quasi-random
    sequences keep theirs, since their order is what they are about.
    """
    arguments = {}
    if node.get("seed") is not None and not node._target_.endswith("QMCSampler"):
        arguments["seed"] = int(np.random.SeedSequence([node.seed, number]).generate_state(1)[0])
    if node._target_.endswith("GridSampler"):  # all its settings are rows from the start
        return optuna.samplers.RandomSampler()
    return instantiate(_alone(node), _execution_whitelist_=SAMPLERS, **arguments)


def _alone(node: DictConfig) -> DictConfig:
    """The node without the configuration around it, all of which instantiate would copy."""
    return OmegaConf.create(OmegaConf.to_container(node, resolve=True))


def constraint_values(constraints: Mapping | None, figures: Mapping) -> dict[str, float]:
    """How far each figure lies beyond its bound, as Optuna counts: 0 or less is within.

    constraints: {figure: {max: bound} or {min: bound}}. Raises ValueError.
    """
    found = {}
    for figure, bounds in (constraints or {}).items():
        if not isinstance(bounds, (Mapping, DictConfig)) or not bounds or not bounds.keys() <= {"min", "max"}:
            raise ValueError(f"hydra.sweeper.constraints.{figure}={bounds} has no bound. Write {{max: 20000}}.")
        if figure not in NUMBERS:
            raise ValueError(f"hydra.sweeper.constraints.{figure}: no figure of a run. Known: {', '.join(NUMBERS)}.")
        for side, bound in bounds.items():
            if isinstance(bound, bool) or not isinstance(bound, (int, float)):
                raise ValueError(f"hydra.sweeper.constraints.{figure}.{side}={bound!r} cannot be: write a number.")
            value = figures.get(figure)
            if value is None or not math.isfinite(value):
                found[f"{figure} {side}"] = NOT_MET
            else:
                found[f"{figure} {side}"] = value - bound if side == "max" else bound - value
    return found
