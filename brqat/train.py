"""The training entrypoint: composes a run from its config groups, and is the only reader of cfg.

float network -> (its baseline, trained once) -> quantize -> calibrate -> fit -> summary.json
"""

import copy
import difflib
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from brqat import checkpoint
from brqat.alpha_policy import AlphaPolicy
from brqat.dataset.files import Files
from brqat.dataset.pixels import Pixels, check_batch_size
from brqat.dataset.splits import Splits
from brqat.fit import Diverged, Fit, Recipe, Score, evaluate, fixed_batches
from brqat.interrupt import Interrupted, StopRequest, stop_request
from brqat.layers import LayerCost, Scheme, calibrate, quantize, sites
from brqat.levels import recording
from brqat.provenance import content_hash, git_sha, versions
from brqat.regularizer.none import NoRegularizer
from brqat.tracking.files import NoDashboard, RunFiles

log = logging.getLogger(__name__)

# What a config may instantiate: our own rooms, torchvision's models and torch's optimizers.
TARGETS = ["brqat.*", "torch.optim.*", "torchvision.models.*"]
GROUPS = ("quantizer", "regularizer", "alpha_policy", "dataset", "model", "optimizer", "tracking")
# Settings that say where a run lives, not what it computes.
NOT_HASHED = ("tracking", "resume", "cache_dir")
OBJECTIVES = {
    "val_acc": 0.0,
    "val_loss": 1e9,
}  # and what a run that cannot be judged is given: the worst, finite


def config_dir() -> str:
    """conf/ beside the package in a checkout, or inside it in a wheel: whichever holds train.yaml."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"no conf/train.yaml in or beside {package}: the installation is incomplete")


@hydra.main(config_path=config_dir(), config_name="train")
def main(cfg: DictConfig) -> float:
    """One run, in Hydra's output folder. Returns the objective, finite whatever happened to the run.

    A setting that cannot work is said in a sentence, without the traceback, unless a sweeper is there to be told.
    """
    hydra_cfg = HydraConfig.get()
    try:
        return run(cfg, Path(hydra_cfg.runtime.output_dir))["objective"]
    except ValueError as error:
        if hydra_cfg.mode != RunMode.RUN or "HYDRA_FULL_ERROR" in os.environ:
            raise
        log.error("brqat: %s", error)
        raise SystemExit(2) from None


@dataclass(frozen=True)
class Settings:
    """The config's top level; conf/train.yaml says what each key means."""

    seed: int
    epochs: int
    warmup_epochs: int
    batch_size: int
    eval_batch_size: int
    device: str
    precision: str
    objective: str
    pretrained: str
    pretrain_epochs: int
    calibration_batches: int
    bn_batches: int
    level_pictures: int
    histogram_every: int
    cache_dir: str
    resume: bool

    def __post_init__(self):
        least = {
            "seed": 0,
            "epochs": 0,
            "warmup_epochs": 0,
            "batch_size": 2,  # BatchNorm has no variance over one picture
            "eval_batch_size": 1,
            "pretrain_epochs": 1,
            "calibration_batches": 1,
            "bn_batches": 1,
            "level_pictures": 1,
            "histogram_every": 1,
        }
        for key, low in least.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{key}={value!r} cannot be: write a whole number, {low} or more.")
        for key, words in (("precision", ("fp32", "bf16")), ("objective", tuple(OBJECTIVES))):
            if getattr(self, key) not in words:
                raise ValueError(f"{key}={getattr(self, key)!r} is not known. Write one of {', '.join(words)}.")
        if not isinstance(self.resume, bool):
            raise ValueError(f"resume={self.resume!r} is neither true nor false.")

    @classmethod
    def of(cls, cfg: DictConfig) -> "Settings":
        known = [f.name for f in fields(cls)]
        given = {key: value for key, value in cfg.items() if key not in GROUPS}
        unknown = sorted(set(given) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*known, *GROUPS], n=1)
            hint = f" Did you mean {near[0]}?" if near else f" The keys are {', '.join([*known, *GROUPS])}."
            raise ValueError(f"{unknown[0]} is no key of a run: nothing would read it.{hint}")
        return cls(**given)

    def torch_device(self) -> torch.device:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            device = torch.device(name)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device={self.device} cannot be used here ({str(error).splitlines()[0]}). Write device=auto or cpu."
            ) from error
        return device


def run(cfg: DictConfig, folder: Path) -> dict:
    """A whole run in its folder; returns what summary.json holds.

    A run that diverges or is told to stop by SIGINT or SIGTERM (SystemExit, after its summary) leaves a status; any
    other error is written into the summary and raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = RunFiles(folder)
    with _only_process_in(folder), stop_request() as stop:
        before = files.read_summary() or {}
        if before.get("status") == "completed" and cfg.get("resume") is True:
            log.info("this run is complete already: %s", files.summary)
            return before
        if not cfg.get("resume") and (files.last.exists() or before.get("status") == "completed"):
            raise ValueError(
                f"{folder} holds a run already, which a new one would overwrite. To go on with it: resume=true. "
                "For another run: another hydra.run.dir."
            )
        summary = {"status": "failed", "seed": cfg.get("seed"), "config_hash": _config_hash(cfg)}
        summary |= {"git_sha": git_sha(), "versions": versions()} | _study(cfg)
        dashboard = NoDashboard()
        try:
            dashboard = _make(cfg.tracking, "tracking")
            summary |= _run(cfg, files, dashboard, stop)
        except Interrupted as signal:
            summary |= {"status": "interrupted", "error": f"stopped by {signal}"}
            log.warning("stopped by %s. To go on: the same command with hydra.run.dir=%s resume=true", signal, folder)
            raise SystemExit(128 + signal.signal) from None
        except BaseException as error:
            summary["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            summary.setdefault("objective", OBJECTIVES.get(cfg.get("objective"), 0.0))
            summary["wandb_run_id"] = dashboard.run_id
            dashboard.finish(summary)
            files.write_summary(summary)
        log.info("%s  results in %s", _verdict(summary), folder)
        return summary


def _run(cfg: DictConfig, files: RunFiles, dashboard, stop: StopRequest) -> dict:
    """The run itself; returns its part of the summary."""
    settings = Settings.of(cfg)
    device = settings.torch_device()
    # Every group is made before anything is trained, so that whatever is impossible fails now.
    scheme: Scheme = _make(cfg.quantizer, "quantizer")
    regularizer = _make(cfg.regularizer, "regularizer") if not scheme.is_float else NoRegularizer()
    policy: AlphaPolicy = _make(cfg.alpha_policy, "alpha_policy")
    make_optimizer, lr_warmup = _optimizer(cfg.optimizer)
    splits: Splits = _make(cfg.dataset, "dataset").to(device)
    recipe = Recipe(
        epochs=settings.epochs,
        warmup_epochs=settings.warmup_epochs,
        batch_size=settings.batch_size,
        eval_batch_size=settings.eval_batch_size,
        seed=settings.seed,
        lr_warmup_epochs=lr_warmup,
        bn_batches=settings.bn_batches,
        level_pictures=settings.level_pictures,
        histogram_every=settings.histogram_every,
        autocast=partial(torch.autocast, device.type, torch.bfloat16, enabled=settings.precision == "bf16"),
    )
    check_batch_size(settings.batch_size, len(splits.train))
    torch.manual_seed(settings.seed)
    model = _make(cfg.model, "model", num_classes=splits.num_classes, in_channels=splits.channels)
    model = model.to(device, memory_format=torch.channels_last)
    log.info(
        "%s on %s: %d training, %d validation, %d test pictures",
        scheme.tag, device, len(splits.train), len(splits.val), len(splits.test),
    )  # fmt: skip
    log.info("%s", policy.describe(regularizer, settings.warmup_epochs))
    _say_what_never_begins(settings, regularizer, policy)

    start = partial(_quantized, scheme=scheme, splits=splits, recipe=recipe, batches=settings.calibration_batches)
    verdict = partial(_check_stability, policy, regularizer, make_optimizer)
    float_score = None
    if settings.pretrained == "auto" and not scheme.is_float:
        # A rehearsal on the untrained network: an impossible quantization should not cost a float training first.
        rehearsal, _ = start(copy.deepcopy(model))
        verdict(rehearsal, splits, recipe)
        float_score = _float_baseline(cfg, settings, model, splits, recipe, make_optimizer, device, stop)
    elif settings.pretrained not in ("auto", "none"):
        checkpoint.load_float_weights(model, Path(settings.pretrained))
    model, costs = start(model)
    verdict(model, splits, recipe)

    fit = Fit(model, splits, recipe, make_optimizer, regularizer, policy, files, _config_hash(cfg), dashboard, stop)
    resumed = _resume(fit, cfg) if settings.resume else False
    dashboard.start(
        files.folder,
        OmegaConf.to_container(cfg, resolve=True),
        [scheme.tag],
        fit.kept.get("wandb_run_id"),
        files.epochs() if resumed else [],
    )
    fit.kept["wandb_run_id"] = dashboard.run_id

    facts = _facts(scheme, costs, settings, device) | {
        "float_val_acc": float_score and float_score["val_acc"],
        "float_test_acc": float_score and float_score["test_acc"],
    }
    try:
        if settings.epochs == 0:
            fit.evaluate_without_training()
        fit.train(scheme.tag)
    except Diverged as error:
        log.error("%s. The last whole epoch's checkpoint is kept.", error)
        return facts | {"status": "diverged", "error": str(error)} | _standing(fit)
    return facts | _report(fit, settings)


# ---- the parts of a run


def _quantized(model: nn.Module, scheme: Scheme, splits: Splits, recipe: Recipe, batches: int):
    """The model quantized and calibrated in place, and what its layers cost."""
    example = next(iter(fixed_batches(splits, recipe, 1)))
    costs = quantize(model, example, *((scheme.inner, scheme.outer) if not scheme.is_float else (scheme.inner,)))
    if sites(model):
        calibrate(model, fixed_batches(splits, recipe, batches))
    return model, costs


def _check_stability(policy, regularizer, make_optimizer, model, splits: Splits, recipe: Recipe) -> None:
    found = sites(model)
    optimizer = policy.optimizer(make_optimizer, model, found.values())
    with torch.no_grad(), recording(found.values()):
        model.eval()(next(iter(fixed_batches(splits, recipe, 1))))
        policy.check_stability(found, regularizer, optimizer)


def _float_baseline(cfg, settings, model, splits, recipe, make_optimizer, device, stop) -> dict:
    """Fills the model with float weights, trained by this same harness unless the cache holds them; its summary.

    The cache key is everything that determines the weights. Several runs that want one baseline wait for one trainer,
    and a baseline that was stopped goes on from its last epoch.
    """
    determines = {
        "brqat": versions()["brqat"],
        "torch": torch.__version__,
        "device": device.type,
        "precision": settings.precision,
        "seed": settings.seed,
        "epochs": settings.pretrain_epochs,
        "batch_size": settings.batch_size,
        "eval_batch_size": settings.eval_batch_size,
        "bn_batches": settings.bn_batches,
        "data": splits.fingerprint,
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "optimizer": OmegaConf.to_container(cfg.optimizer, resolve=True),
    }
    key = content_hash(determines)
    files = RunFiles(Path(settings.cache_dir).expanduser() / "float" / key)
    recipe = Recipe(**vars(recipe) | {"epochs": settings.pretrain_epochs, "warmup_epochs": 0})

    def train() -> None:
        log.info("training the float baseline, once: %s", files.folder)
        untouched = AlphaPolicy(weight="learnable", act="learnable")
        fit = Fit(
            copy.deepcopy(model), splits, recipe, make_optimizer, NoRegularizer(), untouched, files, key,
            NoDashboard(), stop,
        )  # fmt: skip
        if files.last.exists():
            fit.resume(checkpoint.load(files.last, device))
        else:
            files.cut_after(0)
        try:
            fit.train("float")
        except Diverged as error:
            raise ValueError(f"the float baseline diverged: {error}. Lower optimizer.lr.") from error
        files.write_summary({"config": determines} | _report(fit, settings))

    checkpoint.once(
        files.folder,
        done=files.summary.exists,
        make=train,
        waiting=lambda: log.info("another run is training the float baseline: waiting for %s", files.folder),
    )
    summary = files.read_summary()
    checkpoint.load_float_weights(model, files.best)
    log.info("float baseline: %s", _percent(summary))
    return summary


def _resume(fit: Fit, cfg: DictConfig) -> bool:
    """True if the folder held a checkpoint to go on from."""
    if not fit.files.last.exists():
        log.info("resume=true, and no checkpoint yet: starting from the beginning")
        fit.files.cut_after(-1)
        return False
    state = checkpoint.load(fit.files.last, fit.device)
    if state["fingerprint"] != fit.fingerprint:
        raise ValueError(
            f"{fit.files.last} belongs to a run with another configuration ({state['fingerprint']}, this one "
            f"is {fit.fingerprint}): resuming would mix the two. Give the command that started it, or another "
            "hydra.run.dir."
        )
    fit.resume(state)
    log.info("resumed after epoch %d", fit.epoch)
    return True


def _report(fit: Fit, settings: Settings) -> dict:
    """The end of a run: the test set, read here and nowhere else, with the epoch that validation chose.

    acc is with BatchNorm re-estimated, as the epoch was chosen; acc_running with the statistics training left.
    """

    def score(part: Pixels | Files) -> Score:
        return evaluate(fit.model, part.in_order(settings.eval_batch_size))

    val, test = fit.splits.val, fit.splits.test
    fit.model.eval()
    with fit.recipe.autocast():
        with fit.reestimated():
            last_val, last_test = score(val), score(test)
        best = checkpoint.load(fit.files.best, fit.device)
        fit.model.load_state_dict(best["model"])
        chosen = score(test)
        fit.model.load_state_dict(best["running"], strict=False)
        running_val, running_test = score(val), score(test)
    return {
        "status": "completed",
        "objective": getattr(fit.best, settings.objective.removeprefix("val_")),
        **_standing(fit),
        "val_acc_running": running_val.acc,
        "test_acc": chosen.acc,
        "test_loss": chosen.loss,
        "test_acc_running": running_test.acc,
        "last_val_acc": last_val.acc,
        "last_test_acc": last_test.acc,
    }


def _standing(fit: Fit) -> dict:
    """Where validation stands, whether or not the run came to its end."""
    best: Score | None = fit.best
    return {
        "val_acc": best and best.acc,
        "val_loss": best and best.loss,
        "best_epoch": fit.best_epoch,
        "last_epoch": fit.epoch,
        "seconds": fit.seconds,
    }


# ---- small things


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
    if lr == 0:
        raise ValueError("optimizer.lr=0 would train nothing. Post-training quantization is epochs=0.")
    make = _make(settings, "optimizer")
    try:
        make([torch.nn.Parameter(torch.zeros(1))])  # refuses an unknown key now, not after the float baseline
    except TypeError as error:
        raise ValueError(f"optimizer: {error}. Its keys stand in conf/optimizer/.") from error
    return make, lr_warmup


def _say_what_never_begins(settings: Settings, regularizer, policy: AlphaPolicy) -> None:
    if settings.warmup_epochs == 0 and "frozen" in policy.of.values():
        log.warning("frozen with warmup_epochs=0: alpha stays as calibration found it and never learns")
    if 0 < settings.epochs <= settings.warmup_epochs:
        idle = [name for name, on in (("the regularizer", any(regularizer.lambdas.values())),
                                      ("the freeze", "frozen" in policy.of.values())) if on]  # fmt: skip
        if idle:
            log.warning(
                "epochs=%d is over before warmup_epochs=%d: this run never comes to %s",
                settings.epochs, settings.warmup_epochs, " and ".join(idle),
            )  # fmt: skip


def _facts(scheme: Scheme, costs: list[LayerCost], settings: Settings, device: torch.device) -> dict:
    bits = {kind: 32 if width == "float" else width for kind, width in scheme.bits.items()}
    return {
        "epochs": settings.epochs,
        "weight_bits": bits["weight"],
        "act_bits": bits["act"],
        # Conv and linear weights at their own widths; biases, BatchNorm and step sizes are not counted.
        "weight_bytes": sum(math.ceil(cost.weights * cost.weight_bits / 8) for cost in costs),
        "bops": sum(cost.bops for cost in costs),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _study(cfg: DictConfig) -> dict:
    return {"study_name": None, "trial_number": None}


def _config_hash(cfg: DictConfig) -> str:
    """Of everything that determines the result, seed included: two runs with one hash are the same run."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    return content_hash({key: value for key, value in resolved.items() if key not in NOT_HASHED})


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


def _verdict(summary: dict) -> str:
    if summary["status"] != "completed":
        return f"{summary['status']}: {summary.get('error', '')}"
    return _percent(summary) + (
        f"  (float {100 * summary['float_test_acc']:.2f}%)" if summary.get("float_test_acc") is not None else ""
    )


def _percent(summary: dict) -> str:
    return "test {:.2f}%  val {:.2f}%  best epoch {}".format(
        100 * summary["test_acc"], 100 * summary["val_acc"], summary["best_epoch"]
    )


if __name__ == "__main__":
    sys.exit(main())
