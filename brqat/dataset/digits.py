"""scikit-learn's 1,797 handwritten digits, 8 x 8 pixels: nothing to download, seconds on a CPU."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from brqat.dataset.augment import Augment
from brqat.dataset.splits import Splits, hold_out, in_memory, stratified


def load(val_fraction: float, split_seed: int, augment: str, pad: int) -> Splits:
    """The test set is a stratified 25% (450 pictures), the same whatever the settings."""
    pixels, target = read()
    # Pixels are the whole numbers 0..16: times 15 they fill 0..240 exactly, times 255 / 16 not.
    images = torch.from_numpy(pixels * 15).to(torch.uint8)[:, None]  # (1797, 1, 8, 8)
    labels = torch.from_numpy(target).long()
    rest, test = stratified(labels, fraction=0.25, seed=0)
    classes = [str(name) for name in range(10)]
    parts = hold_out(labels, rest, test, val_fraction, split_seed, classes)
    return in_memory(images, labels, parts, classes, Augment(augment, pad))


def read() -> tuple[np.ndarray, np.ndarray]:
    """Pixels 0..16 (1797, 8, 8) and labels (1797,), as sklearn.datasets.load_digits() has them.

    From its file: the import of scikit-learn, with scipy and pandas, takes a second, the file a hundredth of one.
    """
    if (found := importlib.util.find_spec("sklearn")) and found.origin:
        file = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")  # (1797, 65), the label last
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    from sklearn.datasets import load_digits  # a release that keeps them elsewhere

    digits = load_digits()
    return digits.images, digits.target
