"""A whole set in memory: uint8 pixels that live on the device, normalised batch by batch.

`plain` says in torch what a batch is. On a CPU that takes a pass over memory for each of its steps, so kernels/ makes
the batch in one, to the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brqat import kernels
from brqat.dataset.augment import UNCHANGED, Augment, Draws

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W) float32, channels_last; labels (B,) int64


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images and labels of one split. CIFAR-10 takes 150 MB: it fits on any device, so no worker feeds it."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64
    mean: Tensor  # (C,) float32, of the training split's pixels / 255
    std: Tensor  # (C,) float32
    augment: Augment = UNCHANGED

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Pixels":
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "mean", "std")}
        return replace(self, **moved)

    def epoch(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """One shuffled, augmented epoch of full batches, a pure function of `seed`.

        Raises ValueError if the set has no full batch.
        """
        check_batch_size(batch_size, len(self))
        draws = self.augment.draw(len(self), seed).to(self.images.device)
        return self._batches(draws.full_batches(batch_size), self.augment)

    def in_order(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The images as they are, in fixed order, the last partial batch included; at most `limit` images."""
        draws = Draws.unchanged(evenly_spaced(len(self), limit).to(self.images.device))
        return self._batches(draws.batches(batch_size), UNCHANGED)

    def _batches(self, batches: Iterable[Draws], augment: Augment) -> Iterator[Batch]:
        make = self._maker(augment)
        for batch in batches:
            yield make(batch), self.labels.index_select(0, batch.order)

    def _maker(self, augment: Augment) -> Callable[[Draws], Tensor]:
        """plain, or what gives its bits in a fraction of its time."""
        if kernels.native_on(self.images.device):
            table = value_table(self.mean, self.std)
            return lambda draws: torch.ops.brqat.feed(self.images, *draws, augment.reach, table)
        return lambda draws: plain(self.images, draws, augment, self.mean, self.std)


def evenly_spaced(size: int, limit: int | None) -> Tensor:
    """Indices of at most `limit` of `size` images, (N,) int64: all over the set, which may be sorted by class."""
    count = size if limit is None else min(limit, size)
    return torch.arange(count) * size // max(count, 1)


def check_batch_size(batch_size: int, size: int) -> None:
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size={batch_size} makes no full batch of {size} training images, and incomplete batches "
            f"are dropped: write a batch_size from 1 to {size}"
        )


def plain(images: Tensor, draws: Draws, augment: Augment, mean: Tensor, std: Tensor) -> Tensor:
    """The batch that `draws` makes of images (N, C, H, W) uint8, in torch alone: what the C++ must equal."""
    return normalise(augment(images.index_select(0, draws.order), draws), mean, std)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> (images / 255 - mean) / std in float32, channels_last."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def value_table(mean: Tensor, std: Tensor) -> Tensor:
    """What normalise makes of each of the 256 values a pixel can have: (C, 256) float32."""
    values = torch.arange(256, dtype=torch.uint8).expand(1, len(mean), 1, 256)
    return normalise(values, mean, std)[0, :, 0].contiguous()


def count_levels(batches: Iterable[Tensor]) -> Tensor:
    """How often each of the 256 values occurs: (C, 256) int64 over batches of (B, C, H, W) uint8."""
    return sum(
        torch.stack([torch.bincount(plane.flatten(), minlength=256) for plane in images.unbind(1)])
        for images in batches
    )


def mean_std(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std of pixels / 255 from their counts (C, 256), in float64: exact, in any order.

    Raises ValueError for a channel of one value.
    """
    value = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(dim=1, keepdim=True)  # (C, 256)
    mean = share @ value
    variance = (share * (value - mean[:, None]).square()).sum(dim=1)
    if (variance == 0).any():
        channel = variance.argmin()
        raise ValueError(
            f"every training pixel of channel {channel} is {mean[channel] * 255:g}, which cannot be scaled "
            "to unit variance: check the pictures"
        )
    return mean.float(), variance.sqrt().float()
