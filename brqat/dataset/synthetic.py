"""Made-up images: smooth class templates under noise of the same smoothness. For tests and for timing.

    image = 128 + 24 * upsample(template[label] + noise * z),  z ~ N(0, 1) on a coarse 4 x 4 grid per channel

Noise per pixel would average out over an image and leave nothing to learn; noise on the coarse grid does not.
"""

import torch
import torch.nn.functional as F

from brqat.dataset.augment import Augment
from brqat.dataset.splits import Splits, hold_out, in_memory

COARSE = 4  # cells per side of the grid that templates and noise live on


def load(
    num_classes: int,
    channels: int,
    image_size: int,
    images: int,
    test_images: int,
    noise: float,
    seed: int,
    val_fraction: float,
    split_seed: int,
    augment: str,
    pad: int,
) -> Splits:
    """`images` for training and validation and `test_images` more, equally many of each class."""
    if num_classes < 2:
        raise ValueError(f"dataset.num_classes={num_classes} leaves nothing to tell apart: write 2 or more")
    if test_images < num_classes:
        raise ValueError(
            f"dataset.test_images={test_images} leaves some of the {num_classes} classes without one: "
            f"write {num_classes} or more"
        )
    generator = torch.Generator().manual_seed(seed)
    templates = torch.randn(num_classes, channels, COARSE, COARSE, generator=generator)
    labels = torch.cat([torch.arange(images), torch.arange(test_images)]) % num_classes
    batches = []
    for batch in labels.split(1024):  # in float32 a large set would need four times the memory it ends with
        coarse = templates[batch]
        coarse = coarse + noise * torch.randn(coarse.shape, generator=generator)
        smooth = F.interpolate(coarse, size=image_size, mode="bilinear")
        batches.append((128 + 24 * smooth).clamp(0, 255).to(torch.uint8))
    classes = [f"class {label}" for label in range(num_classes)]
    rest, test = torch.arange(len(labels)).split([images, test_images])
    parts = hold_out(labels, rest, test, val_fraction, split_seed, classes)
    return in_memory(torch.cat(batches), labels, parts, classes, Augment(augment, pad))
