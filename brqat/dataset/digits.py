"""scikit-learn's 1,797 handwritten digits, 8 x 8 pixels: nothing to download, seconds on a CPU."""

import torch

from brqat.dataset.augment import Augment
from brqat.dataset.splits import Splits, hold_out, in_memory, stratified


def load(val_fraction: float, split_seed: int, augment: str, pad: int) -> Splits:
    """The test set is a stratified 25% (450 pictures), the same whatever the settings."""
    from sklearn.datasets import load_digits  # takes a second to import, which no other data set should pay

    digits = load_digits()
    # Pixels are the whole numbers 0..16: times 15 they fill 0..240 exactly, times 255 / 16 not.
    images = torch.from_numpy(digits.images * 15).to(torch.uint8)[:, None]  # (1797, 1, 8, 8)
    labels = torch.from_numpy(digits.target).long()
    rest, test = stratified(labels, fraction=0.25, seed=0)
    classes = [str(name) for name in digits.target_names]
    parts = hold_out(labels, rest, test, val_fraction, split_seed, classes)
    return in_memory(images, labels, parts, classes, Augment(augment, pad))
