"""brqat with runs that train nothing: the job of benchmarks/sweep.py, which starts it as a process of its own.

    python benchmarks/idle.py OUT.json [--phases] -m hydra/sweeper=study ...

Everything but brqat.train.run is real: Hydra's composing and launching, the ask, the claim, the tell. OUT.json gets the
time at which each job began, by the clock and by this process's CPU, and with --phases what went on between two of
them: seconds, CPU seconds and commits by phase.
"""

import functools
import json
import math
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import hydra._internal.config_loader_impl
import hydra._internal.core_plugins.basic_launcher
import optuna
import sqlalchemy

import brqat.study.ledger
import brqat.study.storage
import brqat.study.trial
import brqat.study.worker
import brqat.train

OTHER = "the rest"
# (where, attribute, phase). Time counts for the innermost phase only.
FUNCTIONS = [
    (hydra._internal.config_loader_impl.ConfigLoaderImpl, "load_sweep_config", "Hydra: compose"),
    (hydra._internal.core_plugins.basic_launcher.BasicLauncher, "launch", "Hydra: folder, config files, log"),
    (optuna.Study, "ask", "ask"),
    (optuna.Study, "tell", "tell"),
    (optuna.Trial, "_suggest", "ask"),
    (optuna.samplers.TPESampler, "sample_independent", "sampler"),
    (optuna.samplers.TPESampler, "sample_relative", "sampler"),
    (optuna.samplers.TPESampler, "infer_relative_search_space", "sampler"),
    (optuna.samplers.TPESampler, "before_trial", "sampler"),
    (optuna.samplers.TPESampler, "after_trial", "sampler"),
    (brqat.study.worker, "sampler_of", "sampler: made"),
    (brqat.study.trial, "sampler_of", "sampler: made"),
    (brqat.study.trial, "open_ledger", "job: opens the study"),
    (brqat.study.trial, "_tell", "tell"),
    (brqat.study.ledger.Ledger, "next_trial", "ask"),
    (brqat.study.ledger.Ledger, "requeue_dead", "ask: looks for the dead"),
    (brqat.study.ledger.Ledger, "requeue", "after: gives back what did not tell"),
    (brqat.study.worker.Worker, "_say_ended", "after: says what ended"),
    (brqat.study.worker.Worker, "_stop_if_failing", "after: counts failures"),
]
# The same for context managers, of which entering and leaving count.
CONTEXTS = [
    (brqat.study.storage.Storage, "exclusive", "lock"),
    (brqat.study.ledger.Ledger, "claimed", "claim"),
    (brqat.study.trial.Trial, "beating", "heartbeat thread"),
]


class Phases:
    """Seconds, CPU seconds and commits since the last cut, by phase."""

    def __init__(self):
        self.open, self.seconds, self.cpu, self.commits = [OTHER], Counter(), Counter(), Counter()
        self.since = now()
        self.thread = threading.current_thread()
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", self._commit)
        for where, name, phase in FUNCTIONS:
            setattr(where, name, self._function(getattr(where, name), phase))
        for where, name, phase in CONTEXTS:
            setattr(where, name, self._context(getattr(where, name), phase))

    def cut(self) -> dict[str, dict[str, float]]:
        self._charge()
        done = {"seconds": dict(self.seconds), "cpu": dict(self.cpu), "commits": dict(self.commits)}
        self.seconds, self.cpu, self.commits = Counter(), Counter(), Counter()
        return done

    @contextmanager
    def phase(self, name: str):
        if threading.current_thread() is not self.thread:
            yield
            return
        self._charge()
        self.open.append(name)
        try:
            yield
        finally:
            self._charge()
            self.open.pop()

    def _charge(self) -> None:
        seconds, cpu = now()
        self.seconds[self.open[-1]] += seconds - self.since[0]
        self.cpu[self.open[-1]] += cpu - self.since[1]
        self.since = seconds, cpu

    def _commit(self, _connection) -> None:
        if threading.current_thread() is self.thread:
            self.commits[self.open[-1]] += 1

    def _function(self, function, phase: str):
        @functools.wraps(function)
        def timed(*arguments, **keywords):
            with self.phase(phase):
                return function(*arguments, **keywords)

        return timed

    def _context(self, manager, phase: str):
        @contextmanager
        @functools.wraps(manager)
        def timed(*arguments, **keywords):
            with self.phase(phase):
                inner = manager(*arguments, **keywords)
                value = inner.__enter__()
            try:
                yield value
            except BaseException as error:
                if not inner.__exit__(type(error), error, error.__traceback__):
                    raise
            else:
                with self.phase(phase):
                    inner.__exit__(None, None, None)

        return timed


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def main() -> None:
    out = Path(sys.argv.pop(1))
    wanted = "--phases" in sys.argv
    if wanted:
        sys.argv.remove("--phases")
    began: list[tuple[float, float]] = []
    parts: list[dict] = []
    phases = Phases() if wanted else None

    def run(cfg, folder: Path, trial=None) -> dict:
        """A run's summary, the better the nearer lambda_br is to 1."""
        began.append(now())
        if phases:
            parts.append(phases.cut())
        value = 1 / (1 + abs(math.log10(cfg.regularizer.lambda_br)))
        figures = {"val_acc": value, "val_loss": 1 - value, "test_acc": value, "seconds": 0.0}
        return {"status": "completed", "objective": value} | figures

    brqat.train.run = run
    try:
        brqat.train.main()
    finally:
        out.write_text(
            json.dumps({"began": [one[0] for one in began], "cpu": [one[1] for one in began], "phases": parts[1:]})
        )


if __name__ == "__main__":
    main()
