"""Pictures on disk: decoded by worker processes, either once into memory or anew in every epoch."""

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from brqat.dataset.augment import UNCHANGED, Augment
from brqat.dataset.pixels import Batch, check_batch_size, evenly_spaced, normalise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """The files of a folder as uint8 tensors (channels, image_size, image_size)."""

    root: Path
    names: list[str]  # relative to root
    channels: int  # 1 gray, 3 colour
    image_size: int  # pixels
    resize: bool  # False: a picture of another size is an error

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """Raises ValueError, naming the file, for a picture damaged, of 16 bits or of another size."""
        path = self.root / self.names[index]
        try:
            # PIL, not torchvision.io: that is twice as fast on tiny JPEGs, but it reads fewer formats and its
            # decoders are deprecated.
            with Image.open(path) as picture:
                if picture.mode == "F" or picture.mode.startswith("I"):
                    raise ValueError(f"mode {picture.mode} has more than 8 bits a pixel: convert it to 8")
                picture = picture.convert("RGB" if self.channels == 3 else "L")
        except Exception as error:  # PIL raises SyntaxError, struct.error, OSError and more for damaged files
            raise ValueError(f"cannot read the picture {path}: {error}") from error
        if self.resize and picture.size != (self.image_size, self.image_size):
            picture = resized(picture, self.image_size)
        if picture.size != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures differ in size: {path} has {picture.width} x {picture.height} pixels, "
                f"{self.root / self.names[0]} has {self.image_size} x {self.image_size}: "
                "set dataset.image_size, for example to 64, to resize and center-crop all of them"
            )
        values = torch.from_numpy(np.array(picture))  # (H, W) or (H, W, C)
        return values.view(self.image_size, self.image_size, self.channels).permute(2, 0, 1)

    def __getitems__(self, indices: list[int]) -> Tensor | ValueError:
        """A batch for DataLoader. Errors are returned: raised in a worker, torch would bury the sentence
        under tracebacks and take five seconds a worker to stop.
        """
        try:
            return torch.stack([self[index] for index in indices])
        except ValueError as error:
            return error

    def stream(self, order: Tensor, batch_size: int, workers: int, pinned: bool = False) -> Iterator[Tensor]:
        """Batches (B, C, H, W) uint8 of the pictures that `order` (N,) names, on the CPU."""
        batches = DataLoader(
            self,
            batch_size,
            sampler=order.tolist(),
            num_workers=min(workers, os.cpu_count() or 1),
            collate_fn=default_convert,  # __getitems__ has stacked them
            pin_memory=pinned,
            generator=torch.Generator(),  # without one of its own it would draw from the global RNG
        )
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            yield batch

    def read_once(self, order: Tensor, workers: int) -> Iterator[Tensor]:
        """As stream, with a line in the log every few seconds, in batches small enough for any /dev/shm."""
        started = reported = time.monotonic()
        done = 0
        for images in self.stream(order, max(1, 2**20 // (self.channels * self.image_size**2)), workers):
            yield images
            done += len(images)
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                log.info("read %d of %d pictures in %.0f s", done, len(order), reported - started)
        log.info("read %d pictures in %.1f s", done, time.monotonic() - started)

    def decode(self, workers: int) -> np.ndarray:
        """All pictures, (N, C, H, W) uint8.

        Worker processes, not threads: on large pictures both gain the same, on tiny ones two threads fight
        for the interpreter lock and are slower than one.
        """
        decoded = np.empty((len(self), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        start = 0
        for images in self.read_once(torch.arange(len(self)), workers):
            decoded[start : start + len(images)] = images.numpy()
            start += len(images)
        return decoded


def resized(picture: Image.Image, size: int) -> Image.Image:
    """The shorter side becomes size, then the centre is cut out.

    Pixel for pixel torchvision's resize and center_crop, whose import takes longer than a small run.
    """
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


@dataclass(frozen=True, eq=False)
class Files:
    """One split of a folder too large for memory: the methods of Pixels, and its batches to the last bit."""

    pictures: Pictures
    labels: Tensor  # (N,) int64, on the CPU
    mean: Tensor  # (C,) float32, of the training split's pixels / 255
    std: Tensor  # (C,) float32
    augment: Augment = UNCHANGED
    workers: int = 0  # processes that decode; 0 decodes in this one
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Files":
        return replace(self, device=device, mean=self.mean.to(device), std=self.std.to(device))

    def epoch(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """As Pixels.epoch: shuffled, augmented, full batches, a pure function of `seed`."""
        check_batch_size(batch_size, len(self))
        return self._epoch(batch_size, seed)

    def _epoch(self, batch_size: int, seed: int) -> Iterator[Batch]:
        draws = self.augment.draw(len(self), seed)
        read = self._read(draws.order[: len(self) // batch_size * batch_size], batch_size)
        for (images, labels), batch in zip(read, draws.to(self.device).full_batches(batch_size), strict=True):
            yield normalise(self.augment(images, batch), self.mean, self.std), labels

    def in_order(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """As Pixels.in_order: unaugmented, the last partial batch included, at most `limit` images."""
        for images, labels in self._read(evenly_spaced(len(self), limit), batch_size):
            yield normalise(images, self.mean, self.std), labels

    def _read(self, order: Tensor, batch_size: int) -> Iterator[Batch]:
        """The raw batches of `order` on the device: images uint8, labels."""
        pinned = torch.device(self.device).type == "cuda"  # pinned memory lets the copy run beside the step
        labels = self.labels[order].to(self.device).split(batch_size)
        images = self.pictures.stream(order, batch_size, self.workers, pinned)
        for image_batch, label_batch in zip(images, labels, strict=True):
            yield image_batch.to(self.device, non_blocking=pinned), label_batch
