"""Training images per second, from uint8 in memory to normalised float32 batches: the usual way and brqat's two.

    python benchmarks/feed.py                        # a table in markdown; a minute on two cores
    python benchmarks/feed.py --json --threads 2     # one JSON object

The set is as large as CIFAR-10, 50,000 images of 3 x 32 x 32, of random pixels; batches of 128, random crops with 4
pixels of padding, mirrored at random. The batches are thrown away: nothing trains beside the feeding.

DataLoader     torchvision, image by image, behind a DataLoader with 2 worker processes, which live through all
               epochs: a PIL image as torchvision.datasets.CIFAR10 gives it, RandomCrop, RandomHorizontalFlip,
               ToTensor, Normalize
plain torch    brqat.dataset.pixels.plain: a whole batch at a time, in torch's operations
native         brqat's C++: a whole batch in one pass, the same bits

A figure is of one whole epoch, with its shuffle, after one epoch that is not counted. The ways take turns within a
repeat and the order is reversed between repeats; ratios are of one repeat's figures.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from machine import line, machine
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from brqat import kernels
from brqat.dataset.augment import Augment
from brqat.dataset.pixels import Pixels, plain

IMAGES, BATCH, PAD, WORKERS = 50_000, 128, 4, 2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # CIFAR-10's
USUAL, PLAIN, NATIVE = f"DataLoader, {WORKERS} workers", "plain torch", "native"


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    kernels.choose("native", torch.device("cpu"))  # an error where there is no compiler: nothing to compare
    rates = measured(ways(given.images), given.images, given.repeats)
    found = {
        "images_per_second": {name: statistics.median(of) for name, of in rates.items()},
        "ratio": {name: spread(quotients(of, rates[USUAL])) for name, of in rates.items() if name != USUAL},
        "machine": machine(),
    }
    print(json.dumps(found, indent=1) if given.json else table(found))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch in this process; as many as torch likes if not given")
    parser.add_argument("--images", type=int, default=IMAGES, help="of the set; fewer are for a trial of this program")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    given = parser.parse_args(arguments)
    if given.repeats < 1 or given.images < BATCH or (given.threads is not None and given.threads < 1):
        parser.error(f"--repeats and --threads take 1 or more, --images {BATCH} or more")
    return given


class Pictures(Dataset):
    """As torchvision.datasets.CIFAR10 keeps and gives them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.data = images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C) uint8
        self.targets = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(images.shape[-1], padding=PAD),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def ways(count: int) -> dict[str, Callable[[int], Iterable[tuple[Tensor, Tensor]]]]:
    """Name -> what makes the batches of an epoch from the epoch's number."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    pixels = Pixels(images, labels, torch.tensor(MEAN), torch.tensor(STD), Augment("crop_flip", PAD))
    loader = DataLoader(
        Pictures(images, labels), BATCH, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
    )

    def in_plain_torch(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        for draws in pixels.augment.draw(count, epoch).full_batches(BATCH):
            batch = plain(images, draws, pixels.augment, pixels.mean, pixels.std)
            yield batch, labels.index_select(0, draws.order)

    return {
        USUAL: lambda epoch: loader,
        PLAIN: in_plain_torch,
        NATIVE: lambda epoch: pixels.epoch(BATCH, epoch),
    }


def measured(makers: dict[str, Callable], count: int, repeats: int) -> dict[str, list[float]]:
    """Images per second of each way, one for each repeat."""
    rates = {name: [] for name in makers}
    for repeat in range(repeats + 1):
        for name in list(makers) if repeat % 2 else reversed(makers):
            began = time.perf_counter()
            seen = sum(len(labels) for _, labels in makers[name](repeat))
            seconds = time.perf_counter() - began
            assert seen == count // BATCH * BATCH
            if repeat:  # the first has started the workers and filled the caches
                rates[name].append(seen / seconds)
    return rates


def quotients(of: list[float], by: list[float]) -> list[float]:
    return [a / b for a, b in zip(of, by, strict=True)]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def table(found: dict) -> str:
    lines = [line(found["machine"]), "", "| way | images a second | against the DataLoader |", "|---|---|---|"]
    for name, rate in found["images_per_second"].items():
        ratio = found["ratio"].get(name, {"median": 1, "low": 1, "high": 1})
        lines.append(f"| {name} | {rate:,.0f} | {ratio['median']:.1f} ({ratio['low']:.1f} to {ratio['high']:.1f}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
