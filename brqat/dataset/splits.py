"""Train, validation and test: which image is where, and what a data set option hands to training.

The validation split picks the epoch and steers the sweep; the test set is read once, at the end. The split
depends on dataset.split_seed, never on a run's seed: runs that are compared have trained on the same images.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from brqat.dataset.augment import Augment
from brqat.dataset.files import Files
from brqat.dataset.pixels import Pixels, count_levels, mean_std


class Splits(NamedTuple):
    """A data set, ready for training. Only `train` is ever augmented."""

    train: Pixels | Files
    val: Pixels | Files
    test: Pixels | Files
    num_classes: int
    channels: int
    image_size: int  # pixels; images are square
    classes: tuple[str, ...]  # names, by label
    fingerprint: str  # sha256 of what determines every batch: the data, the split and the augmentation

    def to(self, device: torch.device | str) -> "Splits":
        return self._replace(train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))


class Parts(NamedTuple):
    """Indices into a set, sorted and without overlap."""

    train: Tensor  # (N_train,) int64
    val: Tensor  # (N_val,) int64
    test: Tensor  # (N_test,) int64


def stratified(
    labels: Tensor,
    fraction: float,
    seed: int,
    classes: Sequence[str] | None = None,
    key: str = "val_fraction",
) -> tuple[Tensor, Tensor]:
    """Splits indices of `labels` (N,) in two: (rest, part), sorted, with `fraction` of every class in part.

    `classes` (names) and `key` (the setting behind `fraction`) serve the errors; with `classes`, each of them
    must occur. Raises ValueError if fraction is outside (0, 0.5] or a class has no image on one side.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(
            f"dataset.{key}={fraction} is outside (0, 0.5]. The validation split picks the epoch and steers "
            "the sweep, the test set is read once, at the end: no run can do without either. "
            f"Write for example dataset.{key}=0.1"
        )
    generator = torch.Generator().manual_seed(seed)
    rest, part = [], []
    for label in range(len(classes)) if classes else labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        size = round(len(members) * fraction)
        if not 0 < size < len(members):
            raise ValueError(
                f"class {classes[label] if classes else label!r} has {len(members)} images, of which "
                f"dataset.{key}={fraction} sets {size} apart: both sides need at least one. "
                f"Add images, remove the class or change dataset.{key}"
            )
        members = members[torch.randperm(len(members), generator=generator)]
        part.append(members[:size])
        rest.append(members[size:])
    return torch.cat(rest).sort().values, torch.cat(part).sort().values


def hold_out(
    labels: Tensor, rest: Tensor, test: Tensor, val_fraction: float, split_seed: int, classes: Sequence[str]
) -> Parts:
    """Takes the validation images out of `rest`, the indices of `labels` (N,) that are not the test set's."""
    kept, held_out = stratified(labels[rest], val_fraction, split_seed, classes)
    return Parts(rest[kept], rest[held_out], test)


def in_memory(
    images: Tensor,
    labels: Tensor,
    parts: Parts,
    classes: Sequence[str],
    augment: Augment,
    content: str | None = None,
) -> Splits:
    """Splits of images (N, C, H, W) uint8 and labels (N,) int64 that are all at hand.

    `content` stands for the data in the fingerprint, where something cheaper than hashing all pixels does.
    """
    train_images = images[parts.train]
    mean, std = mean_std(count_levels([train_images]))
    return Splits(
        train=Pixels(train_images, labels[parts.train], mean, std, augment),
        val=Pixels(images[parts.val], labels[parts.val], mean, std),
        test=Pixels(images[parts.test], labels[parts.test], mean, std),
        num_classes=len(classes),
        channels=images.shape[1],
        image_size=images.shape[-1],
        classes=tuple(classes),
        fingerprint=fingerprint(content or fingerprint(images, labels), *parts, augment),
    )


def fingerprint(*parts: object) -> str:
    """sha256, as hex digits, of tensors (shape, type and bytes) and of anything else by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}\n".encode())
            digest.update(part.cpu().contiguous().numpy())
        else:
            digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()
