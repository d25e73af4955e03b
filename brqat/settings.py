"""The top level of a run's config, checked."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from brqat.kernels import CHOICES as KERNELS


class Objective(NamedTuple):
    """What a run may be judged by."""

    direction: str  # maximize or minimize
    worst: float  # finite, for a run without a verdict


OBJECTIVES = {
    "val_acc": Objective("maximize", 0.0),
    "val_loss": Objective("minimize", 1e9),
    "weight_bytes": Objective("minimize", 1e15),
    "bops": Objective("minimize", 1e18),
}

# Keys that say where a run lives and is shown, not what it computes.
NOT_HASHED = ("tracking", "trial", "resume", "cache_dir", "dataset.cache_dir", "dataset.workers")

# Post-training quantization has no epochs of its own that would say how long the float network trains.
FLOAT_EPOCHS_BEFORE_PTQ = 20

LEAST = {
    "seed": 0,
    "epochs": 0,
    "warmup_epochs": 0,
    "batch_size": 2,  # BatchNorm has no variance over one picture
    "eval_batch_size": 1,  # or null
    "pretrain_epochs": 1,
    "calibration_batches": 1,
    "bn_batches": 1,
    "level_pictures": 1,
    "histogram_every": 1,
    "threads": 1,
}


def what_determines(config: DictConfig) -> dict:
    """The resolved configuration without Hydra's own part and without NOT_HASHED."""
    resolved = OmegaConf.to_container(OmegaConf.masked_copy(config, [k for k in config if k != "hydra"]), resolve=True)
    for key in NOT_HASHED:
        *groups, last = key.split(".")
        node = resolved
        for group in groups:
            node = node.get(group) or {}
        node.pop(last, None)
    return resolved


@dataclass(frozen=True)
class Settings:
    """conf/train.yaml says what each key means. Raises ValueError for a value that cannot be."""

    seed: int
    epochs: int
    warmup_epochs: int
    batch_size: int
    eval_batch_size: int | None
    device: str
    threads: int | None
    precision: str
    compile: bool
    kernels: str
    objective: str | tuple[str, ...]
    pretrained: str
    pretrain_epochs: int | None
    calibration_batches: int
    bn_batches: int
    level_pictures: int
    histogram_every: int
    cache_dir: str
    resume: bool

    def __post_init__(self):
        for key, low in LEAST.items():
            value, may_be_null = getattr(self, key), key in ("pretrain_epochs", "threads", "eval_batch_size")
            if value is None and may_be_null:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                null = ", or null" if may_be_null else ""
                raise ValueError(f"{key}={value!r} cannot be: write a whole number, {low} or more{null}.")
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed} cannot be: write a whole number below 2**31.")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r} is not known. Write one of fp32, bf16.")
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise ValueError(
                    f"objective={name!r} is not known. Write one of {', '.join(OBJECTIVES)}, or several in a list."
                )
        for key in ("device", "pretrained", "cache_dir"):
            if not isinstance(getattr(self, key), str):
                raise ValueError(f"{key}={getattr(self, key)!r} is no text: see conf/train.yaml for what it takes.")
        for key in ("resume", "compile"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r} is neither true nor false: write one of them.")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels={self.kernels!r} is not known. Write one of {', '.join(KERNELS)}.")

    @classmethod
    def of(cls, top: Mapping, groups: tuple[str, ...]) -> "Settings":
        """From the config's top level; a key that is neither a setting nor a group would be read by nothing."""
        known = [field.name for field in fields(cls)]
        given = {key: value for key, value in top.items() if key not in groups}
        unknown = sorted(set(given) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*known, *groups], n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The keys are {', '.join([*known, *groups])}."
            raise ValueError(f"{unknown[0]} is no key of a run: nothing would read it. {hint}")
        if isinstance(given["objective"], Sequence) and not isinstance(given["objective"], str):
            given["objective"] = tuple(given["objective"])
        return cls(**given)

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.objective if isinstance(self.objective, tuple) else (self.objective,)

    def judge(self, figures: Mapping) -> float | list[float]:
        """The objective from a run's figures, where one that is missing counts as the worst; a list of several."""
        found = [OBJECTIVES[name].worst if figures.get(name) is None else figures[name] for name in self.objectives]
        return found if isinstance(self.objective, tuple) else found[0]

    @property
    def float_epochs(self) -> int:
        """Epochs of the float baseline: as many as the quantized network gets, unless that one gets none."""
        return self.pretrain_epochs or self.epochs or FLOAT_EPOCHS_BEFORE_PTQ
