"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 as torchvision downloads and checks them."""

from pathlib import Path

import torch
import torchvision.datasets
from filelock import FileLock
from torch import Tensor

from brqat.dataset.augment import Augment
from brqat.dataset.splits import Splits, hold_out, in_memory


def load(name: str, root: str, val_fraction: float, split_seed: int, augment: str, pad: int) -> Splits:
    """The set torchvision.datasets.NAME under `root`, downloaded once if it is not there.

    Raises ValueError, naming the folder and what to put there, if the download fails or a file is damaged.
    """
    source = getattr(torchvision.datasets, name)
    folder = Path(root).expanduser()
    try:
        train_set, test_set = read_or_download(source, folder)
        images = torch.cat([pixels(train_set.data), pixels(test_set.data)])  # (N, C, H, W)
        labels = torch.cat([torch.as_tensor(train_set.targets), torch.as_tensor(test_set.targets)]).long()
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images have {len(labels)} labels")
    except Exception as error:  # network, disk, checksum, pickle, idx header: the remedy is the same
        raise ValueError(f"cannot load {name}: {error}\n{remedy(source, folder)}") from error
    rest, test = torch.arange(len(labels)).split([len(train_set.targets), len(test_set.targets)])
    parts = hold_out(labels, rest, test, val_fraction, split_seed, train_set.classes)
    return in_memory(images, labels, parts, train_set.classes, Augment(augment, pad))


def read_or_download(source: type, folder: Path) -> tuple[torchvision.datasets.VisionDataset, ...]:
    """(train, test). Reads first, so that a complete folder may be read-only and needs no network."""
    try:
        return source(folder, train=True), source(folder, train=False)
    except RuntimeError:  # torchvision's word for missing files and for wrong checksums
        folder.mkdir(parents=True, exist_ok=True)
        # The trials of a sweep may start together: one downloads, the others wait and find the files.
        with FileLock(folder / f".{source.__name__}.lock"):
            return source(folder, train=True, download=True), source(folder, train=False)


def pixels(data) -> Tensor:
    """torchvision's array, (N, H, W) or (N, H, W, C), as (N, C, H, W) uint8."""
    data = torch.as_tensor(data)
    return data[:, None] if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()


def remedy(source: type, folder: Path) -> str:
    """What a person without a network puts where."""
    if hasattr(source, "resources"):  # the MNIST family
        target = folder / source.__name__ / "raw"
        address, files = source.mirrors[0], ", ".join(file for file, _ in source.resources)
    else:
        target, address, files = folder, source.url, source.filename
    return (
        f"Put {files} from {address} into {target.absolute()}, after removing what is damaged there; "
        "or set dataset.root to a folder that has them"
    )
