"""Shuffling, random crop and horizontal flip, for whole batches on the device.

    out[r, c] = padded[top + r, left + c']        c' = W - 1 - c where flipped, else c

equals torchvision's RandomCrop(size, padding=pad) followed by RandomHorizontalFlip, sample by sample, without
a Python loop. An epoch's random numbers are drawn at once, on the CPU: the epoch is then a pure function of
its seed on any device, and a GPU receives them in one copy instead of waiting for one in every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Draws(NamedTuple):
    """The random numbers of N samples: which image, the corner of its crop, whether it is mirrored."""

    order: Tensor  # (N,) int64
    top: Tensor  # (N,) int64, pixels, in [0, 2 * pad]
    left: Tensor  # (N,) int64, pixels, in [0, 2 * pad]
    flip: Tensor  # (N,) bool

    @classmethod
    def unchanged(cls, order: Tensor) -> "Draws":
        """The images that `order` (N,) names, whole and not mirrored."""
        corner = torch.zeros_like(order)
        return cls(order, corner, corner, torch.zeros_like(order, dtype=torch.bool))

    def to(self, device: torch.device | str) -> "Draws":
        return Draws(*(field.to(device) for field in self))

    def batches(self, batch_size: int) -> Iterator["Draws"]:
        """Consecutive batches, the last one of what is left."""
        for start in range(0, len(self.order), batch_size):
            yield Draws(*(field[start : start + batch_size] for field in self))

    def full_batches(self, batch_size: int) -> Iterator["Draws"]:
        """Consecutive batches; the incomplete last one is dropped."""
        whole = len(self.order) // batch_size * batch_size
        return Draws(*(field[:whole] for field in self)).batches(batch_size)


@dataclass(frozen=True)
class Augment:
    """What training images go through: none, crop or crop_flip; crops reach `pad` pixels beyond each edge."""

    kind: str = "none"
    pad: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("none", "crop", "crop_flip"):
            raise ValueError(f"dataset.augment={self.kind!r} is none of ours: write none, crop or crop_flip")
        if self.kind != "none" and (not isinstance(self.pad, int) or self.pad < 1):
            raise ValueError(
                f"dataset.pad={self.pad!r} leaves dataset.augment={self.kind} nothing to crop: "
                "write a whole number of pixels from 1 up, or dataset.augment=none"
            )

    @property
    def reach(self) -> int:
        """How many pixels beyond the edges a crop may begin."""
        return 0 if self.kind == "none" else self.pad

    def draw(self, size: int, seed: int) -> Draws:
        """One epoch over `size` images. The order comes first, so that it is the same for every kind."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(size, generator=generator)
        top, left = torch.randint(0, 2 * self.reach + 1, (2, size), generator=generator)
        flip = torch.rand(size, generator=generator) < (0.5 if self.kind == "crop_flip" else 0.0)
        return Draws(order, top, left, flip)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """(B, C, H, W) uint8 -> the same shape, cropped and mirrored as drawn."""
        if self.kind == "none":
            return images
        return crop_flip(images, draws.top, draws.left, draws.flip, self.pad)


UNCHANGED = Augment()


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Zero-pads (B, C, H, W) by `pad`, cuts the window at (top, left) back out and mirrors it where `flip`.

    Rows and columns become one flat index per pixel, so that a single gather moves every sample. With 128
    images of 3 x 32 x 32 on a CPU, indexing by three tensors took five times as long, Tensor.unfold twice.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))  # (B, C, H + 2 pad, W + 2 pad)
    column = torch.arange(width, device=images.device)
    column = torch.where(flip[:, None], width - 1 - column, column) + left[:, None]  # (B, W)
    row = torch.arange(height, device=images.device) + top[:, None]  # (B, H)
    index = row[:, :, None] * padded.shape[-1] + column[:, None, :]  # (B, H, W)
    index = index.view(batch, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view_as(images)
