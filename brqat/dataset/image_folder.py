"""A folder of pictures: train/CLASS/* and test/CLASS/*, or just CLASS/*, which is then split in three."""

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brqat.dataset.augment import UNCHANGED, Augment
from brqat.dataset.cache import cached
from brqat.dataset.files import Files, Pictures
from brqat.dataset.pixels import count_levels, mean_std
from brqat.dataset.splits import Splits, fingerprint, hold_out, in_memory, stratified

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LAYOUT = "it must hold train/CLASS/* and test/CLASS/*, or CLASS/* to be split, with at least two classes"


class Listing(NamedTuple):
    """What is in the folder, before any picture is opened."""

    names: list[str]  # relative to the root, sorted within a class
    labels: Tensor  # (N,) int64
    classes: list[str]
    content: str  # sha256 of names, sizes and modification times


def load(
    root: str | None,
    channels: int,
    image_size: int | None,
    val_fraction: float,
    test_fraction: float,
    split_seed: int,
    augment: str,
    pad: int,
    in_memory_limit: int,
    workers: int,
    cache_dir: str | None,
) -> Splits:
    """Pixels if the decoded pictures take at most `in_memory_limit` MiB, else Files; the yaml tells the rest.

    Raises ValueError for a folder of another layout and for a picture that cannot be read.
    """
    if root in (None, "", "???"):
        raise ValueError(f"dataset.root is not set: write dataset.root=FOLDER; {LAYOUT}")
    if channels not in (1, 3):
        raise ValueError(f"dataset.channels={channels}: pictures are read as 1 (gray) or 3 (colour)")
    folder = Path(root).expanduser()
    settings = Augment(augment, pad)
    listing, rest, test = list_pictures(folder, test_fraction, split_seed)
    parts = hold_out(listing.labels, rest, test, val_fraction, split_seed, listing.classes)
    size = square_size(folder / listing.names[0]) if image_size is None else image_size
    pictures = Pictures(folder, listing.names, channels, size, resize=image_size is not None)
    content = fingerprint(listing.content, channels, image_size)

    def cache_file(key: str) -> Path | None:
        return None if cache_dir is None else Path(cache_dir).expanduser() / f"{key}.npz"

    mebibytes = len(pictures) * channels * size**2 / 2**20
    if mebibytes <= in_memory_limit:
        images = torch.from_numpy(cached(cache_file(content), lambda: pictures.decode(workers)))
        return in_memory(images, listing.labels, parts, listing.classes, settings, content)

    log.info("%d pictures take %.0f MiB, above dataset.in_memory_limit: streaming", len(pictures), mebibytes)

    def count() -> np.ndarray:
        log.info("reading %d training pictures once for their mean and std", len(parts.train))
        return count_levels(pictures.read_once(parts.train, workers)).numpy()

    counts = cached(cache_file(fingerprint(content, parts.train)), count)
    mean, std = mean_std(torch.from_numpy(counts))

    def files(index: Tensor, augment: Augment) -> Files:
        part = replace(pictures, names=[listing.names[i] for i in index])
        return Files(part, listing.labels[index], mean, std, augment, workers)

    return Splits(
        train=files(parts.train, settings),
        val=files(parts.val, UNCHANGED),
        test=files(parts.test, UNCHANGED),
        num_classes=len(listing.classes),
        channels=channels,
        image_size=size,
        classes=tuple(listing.classes),
        fingerprint=fingerprint(content, *parts, settings),
    )


def list_pictures(folder: Path, test_fraction: float, split_seed: int) -> tuple[Listing, Tensor, Tensor]:
    """(listing, rest, test): all pictures, and the indices that are not and that are the test set's."""
    if not folder.is_dir():
        raise ValueError(f"dataset.root={folder} is not a folder (from {Path.cwd()}); {LAYOUT}")
    parts = [part for part in ("train", "test") if (folder / part).is_dir()]
    if len(parts) == 1:
        raise ValueError(
            f"dataset.root={folder} holds {parts[0]}/ but not the other of train/ and test/: add it, "
            "or give a folder that holds the classes themselves"
        )
    if not parts:
        listing = list_classes(folder, "")
        rest, test = stratified(listing.labels, test_fraction, split_seed, listing.classes, "test_fraction")
        return listing, rest, test
    for ignored in sorted({entry.name for entry in folder.iterdir() if visible_folder(entry)} - set(parts)):
        log.warning("%s is not read: validation comes out of train/ (dataset.val_fraction)", folder / ignored)
    train, test = (list_classes(folder, part) for part in parts)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"train/ and test/ of {folder} must have the same classes; only one has {', '.join(odd[:5])}"
            f"{' ...' if len(odd) > 5 else ''}: add or remove these folders"
        )
    both = Listing(
        train.names + test.names,
        torch.cat([train.labels, test.labels]),
        train.classes,
        fingerprint(train.content, test.content),
    )
    size = len(train.names)
    return both, torch.arange(size), torch.arange(size, len(both.names))


def list_classes(folder: Path, part: str) -> Listing:
    """The pictures of folder/part/CLASS/*. Other files are skipped with a warning, hidden ones without."""
    classes = sorted(entry.name for entry in (folder / part).iterdir() if visible_folder(entry))
    if len(classes) < 2:
        raise ValueError(
            f"{folder / part} has {len(classes)} class folders ({', '.join(classes) or 'none'}), too few to "
            f"tell apart. As for dataset.root={folder}, {LAYOUT}"
        )
    names, labels, digest = [], [], hashlib.sha256()
    for label, name in enumerate(classes):
        with os.scandir(folder / part / name) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        pictures = [entry for entry in visible if entry.name.lower().endswith(SUFFIXES)]
        if not pictures:
            raise ValueError(f"class folder {folder / part / name} holds no picture: add some or remove it")
        if len(pictures) < len(visible):
            other = next(entry.path for entry in visible if entry not in pictures)
            log.warning("%d entries are not pictures and are skipped, such as %s", len(visible) - len(pictures), other)
        for entry in pictures:
            names.append(os.path.join(part, name, entry.name))
            labels.append(label)
            stat = entry.stat()
            digest.update(os.fsencode(names[-1]) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return Listing(names, torch.tensor(labels), classes, digest.hexdigest())


def visible_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def square_size(path: Path) -> int:
    """Side length in pixels of the picture that sets the size where dataset.image_size does not."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except Exception as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    if width != height:
        raise ValueError(
            f"{path} has {width} x {height} pixels and models take squares: set dataset.image_size, for "
            "example dataset.image_size=64"
        )
    return width
