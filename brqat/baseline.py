"""The float network behind a quantized one: trained once by the same harness, shared by every run that wants it."""

import copy
import logging
from functools import partial
from pathlib import Path

from torch import nn

from brqat import checkpoint
from brqat.alpha_policy import AlphaPolicy
from brqat.dataset.splits import Splits
from brqat.fit import Diverged, Fit, Recipe
from brqat.interrupt import StopRequest
from brqat.provenance import content_hash
from brqat.regularizer.none import NoRegularizer
from brqat.tracking.files import Identity, RunFiles

log = logging.getLogger(__name__)


class FloatBaseline:
    """A float network in the cache, under a key made of everything that determines its weights.

    Runs that want the same one wait for one trainer; the lock falls with a trainer that is killed, and the next goes
    on from its last epoch.
    """

    def __init__(self, cache: Path, determines: dict):
        self.determines = determines
        self.key = content_hash(determines)
        self.files = RunFiles(cache / "float" / self.key)

    def is_trained(self) -> bool:
        return self.files.summary.exists()

    def load_into(self, model: nn.Module) -> dict:
        """Fills the model; returns the baseline's summary."""
        checkpoint.load_float_weights(model, self.files.best)
        return self.files.read_summary()

    def train(
        self,
        model: nn.Module,
        splits: Splits,
        recipe: Recipe,
        make_optimizer: partial,
        stop: StopRequest,
        dashboard: object,
        identity: Identity,
    ) -> None:
        """Trains a copy of the model unless the cache holds it already. A dashboard's files lie in the cache too."""
        fit = partial(
            Fit,
            splits=splits,
            recipe=recipe,
            make_optimizer=make_optimizer,
            regularizer=NoRegularizer(),
            policy=AlphaPolicy(weight="learnable", act="learnable"),
            files=self.files,
            fingerprint=self.key,
            dashboard=dashboard,
            stop=stop,
        )
        said = []

        def waiting() -> None:
            stop.check()
            if not said:
                log.info("another run is training the float baseline: waiting for %s", self.files.folder)
                said.append(True)

        checkpoint.once(
            self.files.folder, self.is_trained, lambda: self._train(fit(copy.deepcopy(model)), identity), waiting
        )

    def _train(self, fit: Fit, identity: Identity) -> None:
        log.info("training the float baseline, once: %s", self.files.folder)
        fit.start_or_resume()
        identity = identity._replace(run_id=fit.kept.get("wandb_run_id"))
        fit.dashboard.start(self.files.folder, self.determines, ["float"], identity, self.files.epochs())
        fit.kept["wandb_run_id"] = fit.dashboard.run_id
        summary = {"config": self.determines, "status": "failed"}
        try:
            fit.train("float")
            summary |= {"status": "completed"} | fit.standing() | fit.test() | {"wandb_run_id": fit.dashboard.run_id}
            self.files.write_summary(summary)
        except Diverged as error:
            raise Diverged(f"the float baseline has nothing to quantize: {error}. Lower optimizer.lr.") from error
        finally:
            fit.dashboard.finish({key: value for key, value in summary.items() if key != "config"})
