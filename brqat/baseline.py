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
from brqat.tracking.files import NoDashboard, RunFiles

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
        self, model: nn.Module, splits: Splits, recipe: Recipe, make_optimizer: partial, stop: StopRequest
    ) -> None:
        """Trains a copy of the model unless the cache holds it already."""
        fit = partial(
            Fit,
            splits=splits,
            recipe=recipe,
            make_optimizer=make_optimizer,
            regularizer=NoRegularizer(),
            policy=AlphaPolicy(weight="learnable", act="learnable"),
            files=self.files,
            fingerprint=self.key,
            dashboard=NoDashboard(),
            stop=stop,
        )
        said = []

        def waiting() -> None:
            stop.check()
            if not said:
                log.info("another run is training the float baseline: waiting for %s", self.files.folder)
                said.append(True)

        checkpoint.once(self.files.folder, self.is_trained, lambda: self._train(fit(copy.deepcopy(model))), waiting)

    def _train(self, fit: Fit) -> None:
        log.info("training the float baseline, once: %s", self.files.folder)
        fit.start_or_resume()
        try:
            fit.train("float")
        except Diverged as error:
            raise Diverged(f"the float baseline has nothing to quantize: {error}. Lower optimizer.lr.") from error
        self.files.write_summary({"config": self.determines, "status": "completed"} | fit.standing() | fit.test())
