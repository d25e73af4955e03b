"""hydra/sweeper=study: hydra-optuna-sweeper's keys, on a study that any number of workers share and that no kill loses.

Start the same command as often as you like, on as many machines as reach the storage: each process is a worker. Hydra
loads this module in every program of the environment, so it imports nothing heavy at the top.
"""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(Sweeper):
    """conf/hydra/sweeper/study.yaml says what each key means."""

    def __init__(self, **keys: Any):
        self.keys = keys

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        import logging

        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        try:
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=task_function, config=config
            )
        except RuntimeError as error:
            logging.getLogger(__name__).error(
                "brqat: %s cannot be made: its plugin is not installed (%s). hydra/launcher=slurm, ray and joblib need "
                "brqat[slurm], brqat[ray] and brqat[joblib].",
                config.hydra.launcher._target_,
                error,
            )
            raise SystemExit(2) from None

    def sweep(self, arguments: list[str]) -> None:
        from brqat.study.worker import Worker

        Worker(self.config, self.hydra_context.config_loader, self.launcher).work(arguments)
