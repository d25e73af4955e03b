"""The training entrypoint: composes a run from its config groups, and is the only reader of cfg.

float network -> (its baseline, trained once) -> quantize -> calibrate -> fit -> summary.json
"""

import copy
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from brqat import checkpoint, kernels
from brqat.alpha_policy import AlphaPolicy
from brqat.baseline import FloatBaseline
from brqat.dataset.pixels import check_batch_size
from brqat.dataset.splits import Splits
from brqat.devices import claimed_device
from brqat.files import config_dir, write_whole
from brqat.fit import Diverged, Fit, Pruned, Recipe, Score, fixed_batches, never
from brqat.fusion import fuse
from brqat.interrupt import Interrupted, StopRequest, stop_request
from brqat.layers import LayerCost, Scheme, calibrate, quantize, sites
from brqat.levels import recording
from brqat.memory import keep_freed_memory
from brqat.provenance import content_hash, git_sha, source_hash, versions
from brqat.regularizer.base import Regularizer
from brqat.settings import OBJECTIVES, Settings, what_determines
from brqat.tracking.files import Identity, NoDashboard, RunFiles

if TYPE_CHECKING:
    from brqat.study.trial import Trial

log = logging.getLogger(__name__)

# What a config may instantiate: our own rooms, torchvision's models and torch's optimizers.
TARGETS = ["brqat.*", "torch.optim.*", "torchvision.models.*"]
GROUPS = ("quantizer", "regularizer", "alpha_policy", "dataset", "model", "optimizer", "tracking", "trial")
# What a run of a study does not do again: a pruned one goes on only under a command of its own.
ENDED = ("completed", "pruned", "diverged")

# What summary.json holds whatever becomes of a run; null for what the run did not come to.
SUMMARY_KEYS = (
    "status", "objective", "val_acc", "test_acc", "float_test_acc", "best_epoch", "epochs", "seconds", "weight_bits",
    "act_bits", "weight_bytes", "bops", "seed", "config_hash", "git_sha", "versions", "device", "study_name",
    "trial_number", "wandb_run_id",
)  # fmt: skip


@hydra.main(config_path=config_dir(), config_name="train")
def main(cfg: DictConfig) -> Any:
    """One run, in Hydra's output folder. Returns the objective, finite whatever happened to the run.

    Under hydra/sweeper=study the run is a trial: its row in the study learns what becomes of it.

    A setting that cannot work is said in a sentence, without the traceback, unless a sweeper is there to be told.
    """
    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    try:
        if hydra_cfg.mode == RunMode.RUN and (sweep := hydra_cfg.runtime.choices.get("sweep")):
            raise ValueError(f"sweep={sweep} is a study of many runs and needs -m: brqat -m sweep={sweep}.")
        if cfg.get("trial") is None:
            return run(cfg, folder)["objective"]
        from brqat.study.trial import run_trial  # here, since a single run has no use for Optuna

        return run_trial(partial(run, cfg, folder), cfg.trial, hydra_cfg.sweeper, folder)
    except ValueError as error:
        if hydra_cfg.mode != RunMode.RUN or "HYDRA_FULL_ERROR" in os.environ:
            raise
        log.error("brqat: %s", error)
        raise SystemExit(2) from None


def run(cfg: DictConfig, folder: Path, trial: "Trial | None" = None) -> dict:
    """A whole run in its folder; returns what summary.json holds.

    A run that diverges or is pruned leaves that as its status. One told to stop by SIGINT or SIGTERM ends in
    SystemExit after its summary is written; any other error is written into the summary and raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = RunFiles(folder)
    with _only_process_in(folder), stop_request() as stop:
        before = files.read_summary() or {}
        if trial and trial.forced and _hash_there(files, before) not in (None, config_hash(cfg)):
            log.warning("the study has been forced to other settings: this trial starts again with them")
            files.clear()
            before = {}
        with _config_of_the_folder_kept(folder):
            _refuse_another_run(cfg, files, before)
        if before.get("status") in (ENDED if trial else ENDED[:1]):
            log.info("this run has ended already: %s", files.summary)
            return before
        summary = dict.fromkeys(SUMMARY_KEYS) | {
            "status": "failed",
            "objective": _worst(cfg.get("objective")),
            "seed": cfg.get("seed"),
            "config_hash": config_hash(cfg),
            "git_sha": git_sha(),
            "versions": versions(),
            "study_name": trial and trial.study_name,
            "trial_number": trial and trial.number,
        }
        dashboard = NoDashboard()
        try:
            dashboard = _make(cfg.tracking, "tracking")
            summary |= _run(cfg, files, dashboard, stop, trial)
        except Interrupted as signal:
            summary |= {"status": "interrupted", "error": f"stopped by {signal}"}
            if trial:
                log.warning("stopped by %s. To go on: the same command", signal)
            else:
                log.warning("stopped by %s. To go on: the same command with resume=true and this folder", signal)
                log.warning("(hydra.run.dir=%s, or under -m the same hydra.sweep.dir)", folder)
            raise SystemExit(128 + signal.number) from None
        except Diverged as error:  # of the float baseline; a run's own is met in _run, which knows more of it
            log.error("%s", error)
            summary |= {"status": "diverged", "error": str(error)}
        except (KeyboardInterrupt, SystemExit) as error:  # a second signal, or a batch system's own handler
            summary |= {"status": "interrupted", "error": f"stopped at once by {type(error).__name__}"}
            raise
        except BaseException as error:
            summary["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            summary["wandb_run_id"] = dashboard.run_id
            files.write_summary(summary)
            dashboard.finish(summary)  # last: it may wait for a network
        log.info("%s  results in %s", _in_a_line(summary), folder)
        return summary


class Parts(NamedTuple):
    """What a config describes, before there are data and a network. Making them refuses what cannot be."""

    settings: Settings
    scheme: Scheme
    regularizer: Regularizer
    policy: AlphaPolicy
    make_optimizer: partial
    lr_warmup_epochs: float

    @classmethod
    def of(cls, cfg: DictConfig) -> "Parts":
        return cls(
            Settings.of(cfg, GROUPS),
            _make(cfg.quantizer, "quantizer"),
            _make(cfg.regularizer, "regularizer"),
            _make(cfg.alpha_policy, "alpha_policy"),
            *_optimizer(cfg.optimizer),
        )


class Check:
    """hydra.sweeper.check: makes what configs describe, trains nothing, and raises ValueError for what cannot be.

    with_data: loads the data as well, once for each `dataset` among the configs, and makes each `model` for them.
    with_device: claims the device, which a process that trains nothing itself should not.
    """

    def __init__(self, with_data: bool, with_device: bool):
        self.with_data, self.with_device = with_data, with_device
        self.shapes: dict[str, tuple[int, int, int] | str] = {}  # of data sets: training pictures, classes, channels
        self.networks: set[str] = set()

    def __call__(self, cfg: DictConfig) -> None:
        settings = Parts.of(cfg).settings
        _make(cfg.tracking, "tracking")
        if self.with_device:
            with claimed_device(settings.device):
                pass
        if not self.with_data:
            return
        if settings.pretrained not in ("auto", "none") and not Path(settings.pretrained).is_file():
            raise ValueError(f"pretrained={settings.pretrained} is no file. Write auto, none, or the path of weights.")
        pictures, classes, channels = self._shape(cfg)
        check_batch_size(settings.batch_size, pictures)
        network = json.dumps([OmegaConf.to_container(cfg.model, resolve=True), classes, channels])
        if network not in self.networks:
            _make(cfg.model, "model", num_classes=classes, in_channels=channels)
            self.networks.add(network)

    def _shape(self, cfg: DictConfig) -> tuple[int, int, int]:
        key = json.dumps(OmegaConf.to_container(cfg.dataset, resolve=True))
        if key not in self.shapes:
            try:
                splits: Splits = _make(cfg.dataset, "dataset")
                self.shapes[key] = len(splits.train), splits.num_classes, splits.channels
            except Exception as error:  # not to be tried again: it may have waited for a network
                self.shapes[key] = str(error)
                raise
        shape = self.shapes[key]
        if isinstance(shape, str):
            raise ValueError(shape)
        return shape


def _run(cfg: DictConfig, files: RunFiles, dashboard, stop: StopRequest, trial: "Trial | None") -> dict:
    """The run itself; returns its part of the summary."""
    parts = Parts.of(cfg)
    with claimed_device(parts.settings.device) as device:
        return _run_on(device, cfg, parts, files, dashboard, stop, trial)


def _run_on(device: torch.device, cfg: DictConfig, parts: Parts, files: RunFiles, dashboard, stop, trial) -> dict:
    settings, scheme, regularizer, policy, make_optimizer, lr_warmup_epochs = parts
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if device.type == "cpu":
        keep_freed_memory()
    used = kernels.choose(settings.kernels, device)
    if settings.compile:
        _prepare_compiler(device)
    splits: Splits = _make(cfg.dataset, "dataset").to(device)
    check_batch_size(settings.batch_size, len(splits.train))
    recipe = _recipe(settings, lr_warmup_epochs, device)
    checkpoint.seed_everything(settings.seed)
    model: nn.Module = _make(cfg.model, "model", num_classes=splits.num_classes, in_channels=splits.channels)
    model = model.to(device, memory_format=torch.channels_last)
    log.info("%s on %s: %d training, %d validation, %d test pictures", scheme.tag, device, *map(len, splits[:3]))
    log.info("%s", policy.describe(regularizer, settings.warmup_epochs))
    _say_what_never_begins(settings, regularizer, policy)

    def quantized(model: nn.Module) -> list[LayerCost]:
        """Quantizes and calibrates in place; refuses alphas that will run away."""
        costs = quantize(model, next(iter(fixed_batches(splits, recipe, 1))), scheme)
        if kernels.native_on(device):
            fuse(model)
        calibrate(model, fixed_batches(splits, recipe, settings.calibration_batches))
        if not resuming and settings.epochs > settings.warmup_epochs:  # else BR never comes to act
            _check_stability(model, policy, regularizer, make_optimizer, splits, recipe)
        return costs

    resuming = files.last.exists()  # then the checkpoint holds all weights
    if resuming and device.type == "cpu":
        torch.set_num_threads(checkpoint.load(files.last)["kept"]["threads"])  # they order the sums
    float_summary = {}
    if resuming:
        pass
    elif settings.pretrained == "auto" and not scheme.is_float:
        baseline = FloatBaseline(Path(settings.cache_dir).expanduser(), _baseline_key(cfg, settings, splits, device))
        trained = baseline.is_trained()
        if not trained or "backprop" in policy.of.values():
            # A rehearsal on the untrained network: what cannot be quantized should not cost a float training first,
            # and what is refused must not hang on the cache.
            quantized(copy.deepcopy(model))
        if not trained:
            # Not compiled: the baseline is shared with runs that are not.
            float_recipe = replace(recipe.for_epochs(settings.float_epochs), compiled=False)
            baseline.train(
                model,
                splits=splits,
                recipe=float_recipe,
                make_optimizer=make_optimizer,
                stop=stop,
                dashboard=_make(cfg.tracking, "tracking"),
                identity=Identity(name="float baseline", group=trial and trial.study_name, job_type="baseline"),
            )
        float_summary = baseline.load_into(model)
        log.info("float baseline: %s", _in_a_line(float_summary))
    elif settings.pretrained not in ("auto", "none"):
        checkpoint.load_float_weights(model, Path(settings.pretrained))
    costs = quantized(model)

    checkpoint.seed_everything(settings.seed)  # again: training a baseline has drawn from the generators, a cache not
    hopeless = partial(_hopeless, trial, settings) if trial else never
    fit = Fit(
        model, splits, recipe, make_optimizer, regularizer, policy, files, config_hash(cfg), dashboard, stop, hopeless
    )
    fit.kept = {f"float_{key}": float_summary.get(key) for key in ("val_acc", "test_acc")}
    fit.kept["threads"] = torch.get_num_threads()
    fit.kept["kernels"] = used
    if fit.start_or_resume():
        log.info("resumed after epoch %d", fit.epoch)
        if (before := fit.kept.get("kernels")) != used:
            log.warning("begun with kernels=%s and resumed with kernels=%s: the last digits may differ", before, used)
    past = files.epochs()
    config = OmegaConf.to_container(cfg, resolve=True)
    identity = trial.identity if trial else Identity(fit.kept.get("wandb_run_id"))
    dashboard.start(files.folder, config, [scheme.tag], identity, past)
    fit.kept["wandb_run_id"] = dashboard.run_id

    facts = {
        "epochs": settings.epochs,
        **_size(scheme, costs),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": fit.kept["threads"],
        "kernels": used,
        "float_val_acc": fit.kept["float_val_acc"],
        "float_test_acc": fit.kept["float_test_acc"],
    }
    try:
        if settings.epochs == 0 and not resuming:
            fit.evaluate_without_training()
        fit.train(scheme.tag)
    except Diverged as error:
        log.error("%s. The last whole epoch's checkpoint is kept.", error)
        ended = facts | {"status": "diverged", "error": str(error)} | fit.standing()
        no_verdict = {"val_acc": None, "val_loss": None}
        return ended | {"objective": settings.judge(facts | no_verdict)}
    except Pruned as reason:
        log.info("pruned %s", reason)
        ended = facts | {"status": "pruned", "pruned": str(reason)} | fit.standing()
        return ended | {"objective": settings.judge(ended)}
    ended = facts | {"status": "completed"} | fit.standing()
    return ended | {"objective": settings.judge(ended)} | fit.test()


# ---- the parts of a run


def _prepare_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile has nothing to compile with."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"compile=true needs a C++ compiler, and there is no {compiler}. Write compile=false.")
    torch._dynamo.reset()  # it gives up on a function that was compiled for many runs of one process


def _recipe(settings: Settings, lr_warmup_epochs: float, device: torch.device) -> Recipe:
    return Recipe(
        epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        batch_size=settings.batch_size,
        eval_batch_size=settings.eval_batch_size,
        seed=settings.seed,
        lr_warmup_epochs=lr_warmup_epochs,
        bn_batches=settings.bn_batches,
        level_pictures=settings.level_pictures,
        histogram_every=settings.histogram_every,
        autocast=partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.precision == "bf16"),
        compiled=settings.compile,
    )


def _hopeless(trial: "Trial", settings: Settings, epoch: int, score: Score) -> bool:
    """The pruner's verdict, which counts epochs from the end of warmup."""
    value = {"val_acc": score.acc, "val_loss": score.loss}.get(settings.objectives[0])
    trial.came_to(epoch, settings.epochs, value)
    past = epoch - settings.warmup_epochs
    return past > 0 and value is not None and trial.hopeless(past, value)


def _worst(objective: Any) -> float | list[float]:
    """The objective of a run that came to nothing, whatever its config says."""
    if OmegaConf.is_list(objective):
        return [_worst(name) for name in objective]
    return OBJECTIVES[objective].worst if objective in OBJECTIVES else 0.0


@torch.no_grad()
def _check_stability(model, policy, regularizer, make_optimizer, splits: Splits, recipe: Recipe) -> None:
    found = sites(model)
    with recording(found.values()):
        model.eval()(next(iter(fixed_batches(splits, recipe, 1))))
        policy.check_stability(found, regularizer, policy.optimizer(make_optimizer, model, found.values()))


def _baseline_key(cfg: DictConfig, settings: Settings, splits: Splits, device: torch.device) -> dict:
    """Everything that determines a float baseline's weights and figures."""
    return {
        "versions": versions(),
        "code": source_hash(),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,  # they order the sums
        "precision": settings.precision,
        "seed": settings.seed,
        "epochs": settings.float_epochs,
        "batch_size": settings.batch_size,
        "eval_batch_size": settings.eval_batch_size,
        "bn_batches": settings.bn_batches,
        "data": splits.fingerprint,
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "optimizer": OmegaConf.to_container(cfg.optimizer, resolve=True),
    }


def _size(scheme: Scheme, costs: list[LayerCost]) -> dict[str, int]:
    return {
        "weight_bits": scheme.bits["weight"],
        "act_bits": scheme.bits["act"],
        # Conv and linear weights at their own widths; biases, BatchNorm and step sizes are not counted.
        "weight_bytes": sum(math.ceil(cost.weights * cost.weight_bits / 8) for cost in costs),
        "bops": sum(cost.bops for cost in costs),
    }


def _make(node: DictConfig | dict, group: str, **arguments):
    """What a config group describes; a key that its target does not take is the user's mistake."""
    try:
        return instantiate(node, _execution_whitelist_=TARGETS, **arguments)
    except TypeError as error:
        raise ValueError(f"{group}: {error}. Its keys stand in conf/{group}/.") from error


def _optimizer(node: DictConfig) -> tuple[partial, float]:
    """The optimizer but for its parameters, and the epochs over which its learning rate rises."""
    settings = dict(node)
    lr_warmup = settings.pop("lr_warmup_epochs")
    lr = settings["lr"]
    for key, value in {"lr": lr, "lr_warmup_epochs": lr_warmup, "weight_decay": settings["weight_decay"]}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"optimizer.{key}={value!r} cannot be: write a finite number, 0 or more.")
    momentum = settings.get("momentum", 0)
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise ValueError(f"optimizer.momentum={momentum!r} cannot be: write a number from 0 to below 1.")
    if momentum == 0 and settings.get("nesterov"):
        raise ValueError(
            "optimizer.momentum=0 leaves Nesterov's nothing to look ahead by: add optimizer.nesterov=false."
        )
    if lr == 0:
        raise ValueError("optimizer.lr=0 would train nothing. Post-training quantization is epochs=0.")
    make = _make(settings, "optimizer")
    try:
        make([torch.nn.Parameter(torch.zeros(1))])  # refuses an unknown key now, not after the float baseline
    except TypeError as error:
        raise ValueError(f"optimizer: {error}. Its keys stand in conf/optimizer/.") from error
    return make, lr_warmup


def _say_what_never_begins(settings: Settings, regularizer: Regularizer, policy: AlphaPolicy) -> None:
    freezes = "frozen" in policy.of.values()
    if settings.warmup_epochs == 0 and freezes:
        log.warning("frozen with warmup_epochs=0: alpha stays as calibration found it and never learns")
    if 0 < settings.epochs <= settings.warmup_epochs:
        parts = {"the regularizer": any(regularizer.lambdas.values()), "the freeze": freezes}
        idle = [name for name, wanted in parts.items() if wanted]
        if idle:
            log.warning(
                "epochs=%d is over before warmup_epochs=%d: this run never comes to %s",
                settings.epochs,
                settings.warmup_epochs,
                " and ".join(idle),
            )


# ---- the folder


def config_hash(cfg: DictConfig) -> str:
    """Of everything that determines the result, seed included: two runs with one hash are the same run."""
    return content_hash(what_determines(cfg))


def _refuse_another_run(cfg: DictConfig, files: RunFiles, summary: dict) -> None:
    """A folder holds one run: it is resumed by its own command or left alone."""
    if not files.last.exists() and summary.get("status") != "completed":
        return
    if not cfg.get("resume"):
        raise ValueError(
            f"{files.folder} holds a run already, which a new one would overwrite. To go on with it: resume=true. "
            "For another run: another hydra.run.dir (under -m: hydra.sweep.dir)."
        )
    there, here = _hash_there(files, summary), config_hash(cfg)
    if there != here:
        raise ValueError(
            f"{files.folder} holds a run of another configuration (hash {there}, this command's is {here}): resuming "
            "would mix the two. Give the command that started it, or another hydra.run.dir."
        )


def _hash_there(files: RunFiles, summary: dict) -> str | None:
    """The configuration hash of the run that the folder holds."""
    return checkpoint.load(files.last)["fingerprint"] if files.last.exists() else summary.get("config_hash")


@contextmanager
def _config_of_the_folder_kept(folder: Path) -> Iterator[None]:
    """Puts back .hydra/ of the run that the folder holds if the one that came is refused: Hydra wrote over it."""
    here = sorted((folder / ".hydra").glob("*.yaml"))
    kept = folder / ".hydra" / "kept"
    try:
        yield
    except ValueError:
        for path in kept.glob("*.yaml"):
            write_whole(folder / ".hydra" / path.name, lambda file, path=path: file.write(path.read_bytes()))
        raise
    for path in here:
        kept.mkdir(exist_ok=True)
        write_whole(kept / path.name, lambda file, path=path: file.write(path.read_bytes()))


@contextmanager
def _only_process_in(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is running in {folder}. Wait for it, or give another hydra.run.dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _in_a_line(summary: dict) -> str:
    if summary["status"] != "completed":
        return f"{summary['status']}: {summary.get('error') or summary.get('pruned')}"
    line = "test {:.2f}%  val {:.2f}%  best epoch {}".format(
        100 * summary["test_acc"], 100 * summary["val_acc"], summary["best_epoch"]
    )
    if summary.get("float_test_acc") is not None:
        line += f"  (float {100 * summary['float_test_acc']:.2f}%)"
    return line


if __name__ == "__main__":
    sys.exit(main())
