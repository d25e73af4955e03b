"""The training loop: one network through its epochs, float or quantized, to a checkpoint after each."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from brqat import checkpoint
from brqat.alpha_policy import KINDS, AlphaPolicy
from brqat.batchnorm import reestimated, running_statistics
from brqat.dataset.files import Files
from brqat.dataset.pixels import Pixels
from brqat.dataset.splits import Splits
from brqat.interrupt import StopRequest
from brqat.layers import sites
from brqat.levels import LevelHistory, alpha_gradients, histogram_arrays
from brqat.metrics import aggregate
from brqat.progress import progress
from brqat.regularizer.base import Regularizer
from brqat.schedule import cosine_lr
from brqat.step import Step
from brqat.tracking.files import RunFiles

log = logging.getLogger(__name__)

LEVEL_BATCH = 128  # pictures whose values at all sites are held at once to be measured
GRADIENT_PICTURES = 64  # that alpha's gradients are measured on after an epoch
# Pictures at once in an evaluation. On a GPU the first size that fits from here down, but for files, whose decoded
# batches wait in shared memory; on a CPU 128 were about twice as fast as 512 (LOG.md).
EVAL_BATCH_GPU, EVAL_BATCH_FILES, EVAL_BATCH_CPU = 4096, 512, 128
CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the device


class Diverged(Exception):
    """The loss is not finite."""


class Pruned(Exception):
    """The run is not worth its remaining epochs."""


def never(epoch: int, score: "Score") -> bool:
    """No epoch makes a run hopeless."""
    return False


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever the network."""

    epochs: int
    warmup_epochs: int
    batch_size: int
    eval_batch_size: int | None  # None: what suits the device
    seed: int
    lr_warmup_epochs: float
    bn_batches: int
    level_pictures: int
    histogram_every: int
    autocast: Callable[[], AbstractContextManager]
    compiled: bool = False

    def for_epochs(self, epochs: int) -> "Recipe":
        """The same for another number of epochs, without a warmup."""
        return replace(self, epochs=epochs, warmup_epochs=0)


@dataclass
class Score:
    """An evaluation: accuracy as a fraction, mean cross-entropy."""

    acc: float
    loss: float

    def better_than(self, other: "Score | None") -> bool:
        """Higher accuracy, and at equal accuracy lower loss: small validation splits tie often."""
        return other is None or (self.acc, -self.loss) > (other.acc, -other.loss)


@dataclass
class Fit:
    """A network on its way, and where it stands."""

    model: nn.Module
    splits: Splits
    recipe: Recipe
    make_optimizer: partial
    regularizer: Regularizer
    policy: AlphaPolicy
    files: RunFiles
    fingerprint: str  # of what determines this training; a checkpoint of another is refused
    dashboard: object
    stop: StopRequest
    hopeless: Callable[[int, "Score"], bool] = never  # asked after each epoch but the last
    epoch: int = 0
    best: Score | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    kept: dict = field(default_factory=dict)  # whatever else a resumed run must know

    def __post_init__(self):
        self.sites = sites(self.model)
        self.optimizer = self.policy.optimizer(self.make_optimizer, self.model, self.sites.values())
        self.step = Step(
            self.model,
            self.sites,
            self.regularizer,
            self.policy,
            self.optimizer,
            self.recipe.autocast,
            self.recipe.compiled,
        )
        self.positive = self.step.positive
        of_device = EVAL_BATCH_CPU if self.device.type == "cpu" else EVAL_BATCH_GPU
        if isinstance(self.splits.val, Files):
            of_device = min(of_device, EVAL_BATCH_FILES)
        self.eval_batch_size = self.recipe.eval_batch_size or of_device
        self.levels = LevelHistory(self.sites, self.step.oscillation, self.recipe.warmup_epochs)

    # ---- the loop

    def train(self, name: str) -> None:
        """All epochs that are left.

        Raises Diverged, Pruned or Interrupted; the last whole epoch's checkpoint stands.
        """
        recipe = self.recipe
        steps = len(self.splits.train) // recipe.batch_size
        with progress(log, name, recipe.epochs * steps, self.epoch * steps) as bar:
            for epoch in range(self.epoch + 1, recipe.epochs + 1):
                started = time.perf_counter()
                if epoch == recipe.warmup_epochs + 1:
                    self.policy.freeze(self.sites.values(), self.optimizer)
                means = self._train_epoch(epoch, steps, bar)
                score, line = self._finish_epoch(epoch, means, started)
                bar.state(f"val {100 * score.acc:.1f}%")
                log.info("%s %s", name, line)
                if epoch < recipe.epochs and self.hopeless(epoch, score):
                    raise Pruned(f"after epoch {epoch}, as the study's pruner compares it with other trials")

    def _train_epoch(self, epoch: int, steps: int, bar) -> dict[str, float | None]:
        """One pass over the training split; means over its steps, None for a penalty that does not act.

        train/br and train/br_act are the penalties themselves: the loss adds them times their lambdas.
        """
        recipe = self.recipe
        regularized = epoch > recipe.warmup_epochs
        self.step.prepare(regularized)
        totals = torch.zeros(4, device=self.device, dtype=torch.float64)
        batches = self.splits.train.epoch(recipe.batch_size, epoch_seed(recipe.seed, epoch))
        for number, (images, labels) in enumerate(batches):
            done = (epoch - 1) * steps + number
            self._set_lr(done / (recipe.epochs * steps))
            strength = self._strength(done, steps) if regularized else None
            totals += self.step(images, labels, strength)
            bar.advance()
            if number % CHECK_EVERY == CHECK_EVERY - 1 and not math.isfinite(totals[0].item()):
                raise Diverged(f"the training loss is not finite in epoch {epoch}")
            self.stop.check()
        loss, ce, *penalties = (totals / steps).tolist()
        if not math.isfinite(loss):
            raise Diverged(f"the training loss is not finite in epoch {epoch}")
        acts = [regularized and self.regularizer.lambdas[kind] > 0 for kind in KINDS]
        br, br_act = (value if on else None for value, on in zip(penalties, acts, strict=True))
        return {"train/loss": loss, "train/ce": ce, "train/br": br, "train/br_act": br_act}

    # ---- the end of an epoch

    def _finish_epoch(self, epoch: int, means: dict[str, float | None], started: float) -> tuple[Score, str]:
        """Evaluates, writes every file, and says the epoch in a line."""
        lr = self.optimizer.param_groups[0]["lr"]
        score, rows, histograms = self.evaluate_epoch(epoch)
        seconds = time.perf_counter() - started
        metrics = {
            "epoch": epoch,
            **means,
            "val/acc": score.acc,
            "val/loss": score.loss,
            "lr": lr,
            **self._aggregates(rows),
            "seconds": seconds,
        }
        self.seconds += seconds
        self.epoch = epoch
        self._write(metrics, rows, histograms)
        line = f"epoch {epoch}/{self.recipe.epochs}  ce {means['train/ce']:.4f}  val {100 * score.acc:.2f}%"
        for kind in KINDS:
            if (key := f"levels/{kind}/effectiveness/mean") in metrics:
                line += f"  {kind} effectiveness {metrics[key]:.1f}"
        return score, f"{line}  {seconds:.1f} s"

    def evaluate_epoch(self, epoch: int) -> tuple[Score, list[dict], dict]:
        """Validation score and level figures with BatchNorm re-estimated; keeps the network if it is the best yet."""
        recipe = self.recipe
        trained = running_statistics(self.model)
        with recipe.autocast(), self.reestimated():
            score = self._score(self.splits.val)
            if not math.isfinite(score.loss):
                raise Diverged(f"the validation loss is not finite in epoch {epoch}")
            rows, histograms = self._levels(epoch)
            broken = [row["site"] for row in rows if row["nonfinite"]]
            if broken:
                raise Diverged(f"values of {broken[0]} are not finite in epoch {epoch}")
            if self._eligible(epoch) and score.better_than(self.best):
                self.best, self.best_epoch = score, epoch
                self._save_best(trained)
        return score, rows, histograms

    def _score(self, part: Pixels | Files) -> Score:
        """Of a split. Where the batch was ours to choose, one that does not fit on the device is halved for good."""
        while True:
            try:
                return evaluate(self.model, self._until_stopped(part.in_order(self.eval_batch_size)))
            except torch.OutOfMemoryError:
                if self.recipe.eval_batch_size is not None or self.eval_batch_size == 1:
                    raise
                self.eval_batch_size //= 2
                log.info("evaluating %d pictures at once: more do not fit", self.eval_batch_size)

    def reestimated(self) -> AbstractContextManager:
        """BatchNorm re-estimated on the same few batches of training pictures each time."""
        return reestimated(self.model, fixed_batches(self.splits, self.recipe, self.recipe.bn_batches))

    def evaluate_without_training(self) -> None:
        """The calibrated network as it is: post-training quantization, written down as epoch 0."""
        started = time.perf_counter()
        score, rows, histograms = self.evaluate_epoch(0)
        self.seconds += time.perf_counter() - started
        metrics = {"epoch": 0, "val/acc": score.acc, "val/loss": score.loss, **self._aggregates(rows)}
        self._write(metrics | {"seconds": self.seconds}, rows, histograms)

    def _eligible(self, epoch: int) -> bool:
        """Epochs of warmup do not compete: there the regularizer and the freeze, which a run is about, do not act."""
        return epoch > self.recipe.warmup_epochs or self.recipe.epochs <= self.recipe.warmup_epochs

    def _levels(self, epoch: int) -> tuple[list[dict], dict]:
        if not self.sites:
            return [], {}
        recipe = self.recipe

        def subset() -> Iterator[tuple[Tensor, Tensor]]:
            return self._until_stopped(self.splits.val.in_order(LEVEL_BATCH, limit=recipe.level_pictures))

        rows, histograms = self.levels.evaluate(self.model, (images for images, _ in subset()), epoch)
        few = [part[:GRADIENT_PICTURES] for part in next(subset())]
        strength = self._strength_after(epoch)
        gradients = alpha_gradients(
            self.model, *few, self.sites, self.regularizer, self.policy, strength, self.optimizer
        )
        clamped = self.positive.counts()
        for row in rows:
            row |= gradients[row["site"]] | {"alpha_clamped": clamped[row["site"]]}
        return rows, histogram_arrays(self.sites, histograms, epoch) if self._histogram_due(epoch) else {}

    def _histogram_due(self, epoch: int) -> bool:
        """Before the regularizer begins, at the end, and every few epochs between."""
        return epoch in (self.recipe.warmup_epochs, self.recipe.epochs) or epoch % self.recipe.histogram_every == 0

    def _aggregates(self, rows: list[dict]) -> dict:
        return aggregate(rows, {row["site"]: row["numel"] for row in rows})

    # ---- what a resumed run needs

    def _write(self, metrics: dict, rows: list[dict], histograms: dict) -> None:
        """The checkpoint last: what it does not know of is cut away when the run is resumed."""
        self.files.add_epoch(metrics, rows, histograms)
        self.dashboard.add_epoch(metrics, rows, histograms)
        checkpoint.save(
            self.files.last,
            {
                "fingerprint": self.fingerprint,
                "epoch": self.epoch,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "levels": self.levels.state_dict(),
                "positive": self.positive.state_dict(),
                "best": None if self.best is None else [self.best.acc, self.best.loss, self.best_epoch],
                "random": checkpoint.random_states(),
                "seconds": self.seconds,
                "kept": self.kept,
            },
        )
        self._settle_best()

    def _settle_best(self) -> None:
        """next_best becomes best if last.pt knows of it, and goes if a kill came before."""
        if self.files.next_best.exists():
            if checkpoint.load(self.files.next_best)["epoch"] == self.best_epoch:
                self.files.next_best.replace(self.files.best)
            else:
                self.files.next_best.unlink()

    def _save_best(self, trained: dict[str, Tensor]) -> None:
        """The network as it was evaluated; `running` holds the BatchNorm statistics that training left.

        Under a name of its own until last.pt says that this epoch is the best: a kill between the two leaves a pair
        that belongs together.
        """
        state = {"epoch": self.best_epoch, "model": self.model.state_dict(), "running": trained}
        checkpoint.save(self.files.next_best, state)

    def start_or_resume(self) -> bool:
        """Goes to where the folder's checkpoint stands, True, or clears the folder of what has no checkpoint, False."""
        if not self.files.last.exists():
            self.files.cut_after(-1)
            self.files.best.unlink(missing_ok=True)
            self.files.next_best.unlink(missing_ok=True)
            return False
        state = checkpoint.load(self.files.last, self.device)
        assert state["fingerprint"] == self.fingerprint, "the checkpoint belongs to another training"
        self.epoch = state["epoch"]
        if self.epoch > self.recipe.warmup_epochs:
            self.policy.freeze(self.sites.values(), self.optimizer)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.levels.load_state_dict(state["levels"])
        self.positive.load_state_dict(state["positive"])
        if state["best"] is not None:
            acc, loss, self.best_epoch = state["best"]
            self.best = Score(acc, loss)
        checkpoint.set_random_states(state["random"])
        self.seconds, self.kept = state["seconds"], state["kept"]
        self.files.cut_after(self.epoch)
        self._settle_best()
        return True

    # ---- what comes out

    def standing(self) -> dict:
        """Where validation stands, whether or not the run came to its end."""
        return {
            "val_acc": self.best and self.best.acc,
            "val_loss": self.best and self.best.loss,
            "best_epoch": self.best_epoch,
            "last_epoch": self.epoch,
            "seconds": self.seconds,
        }

    def test(self) -> dict:
        """The test set, read here and nowhere else, with the epoch that validation chose; and with the last.

        acc is with BatchNorm re-estimated, as the epoch was chosen; acc_running with the statistics training left.
        Afterwards the model is the chosen one.
        """

        def score(part: Pixels | Files) -> Score:
            # A new autocast each time: within one it keeps its copies of weights that have been replaced since.
            with self.recipe.autocast():
                return self._score(part)

        val, test = self.splits.val, self.splits.test
        self.model.eval()
        with self.reestimated():
            last_val, last_test = score(val), score(test)
        best = checkpoint.load(self.files.best, self.device)
        assert best["epoch"] == self.best_epoch, "best.pt is not the epoch that validation chose"
        self.model.load_state_dict(best["model"] | best["running"])
        running_val, running_test = score(val), score(test)
        self.model.load_state_dict(best["model"])
        chosen = score(test)
        return {
            "test_acc": chosen.acc,
            "test_loss": chosen.loss,
            "val_acc_running": running_val.acc,
            "test_acc_running": running_test.acc,
            "last_val_acc": last_val.acc,
            "last_test_acc": last_test.acc,
        }

    # ---- small things

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _until_stopped(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            self.stop.check()
            yield batch

    def _set_lr(self, progress: float) -> None:
        factor = cosine_lr(progress, self.recipe.lr_warmup_epochs / self.recipe.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def _strength(self, step: int, steps_per_epoch: int) -> dict[str, float]:
        """lambda of each kind at a step; its schedule runs from the end of warmup to the end."""
        start = self.recipe.warmup_epochs * steps_per_epoch
        end = self.recipe.epochs * steps_per_epoch
        return {kind: self.regularizer.lambda_at(kind, (step - start) / max(end - start - 1, 1)) for kind in KINDS}

    def _strength_after(self, epoch: int) -> dict[str, float]:
        """lambda of each kind at the last step of an epoch, 0 before the regularizer begins."""
        if epoch <= self.recipe.warmup_epochs:
            return dict.fromkeys(KINDS, 0.0)
        steps = len(self.splits.train) // self.recipe.batch_size
        return self._strength(epoch * steps - 1, steps)


def fixed_batches(splits: Splits, recipe: Recipe, count: int) -> Iterable[Tensor]:
    """The same `count` shuffled batches of training pictures whenever asked: for BatchNorm and for calibration."""
    batches = splits.train.epoch(recipe.batch_size, epoch_seed(recipe.seed, 0))
    return (images for images, _ in islice(batches, count))


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's order and augmentation: a resumed run draws what an uninterrupted one would."""
    return seed * 1_000_003 + epoch


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Accuracy and mean cross-entropy over all pictures; the model is in eval mode, the caller chose the precision."""
    correct, loss, count = 0, 0.0, 0
    for images, labels in batches:
        logits = model(images).float()
        loss = loss + nn.functional.cross_entropy(logits, labels, reduction="sum").double()
        correct = correct + (logits.argmax(1) == labels).sum()
        count += len(labels)
    return Score(correct.item() / count, loss.item() / count)
