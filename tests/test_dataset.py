"""Every data set option loads small files of its real format; an epoch is a pure function of its seed."""

import gzip
import hashlib
import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.transforms.functional as TF
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_digits

from brqat import kernels
from brqat.dataset import cache, digits
from brqat.dataset.augment import UNCHANGED, Augment, Draws, crop_flip
from brqat.dataset.files import Files, resized
from brqat.dataset.pixels import Pixels, count_levels, mean_std, plain, value_table
from brqat.dataset.splits import stratified

CONF = Path(__file__).parent.parent / "conf" / "dataset"


def load(option, **keys):
    config = OmegaConf.merge(OmegaConf.load(CONF / f"{option}.yaml"), keys)
    return instantiate(config, _execution_whitelist_=["brqat.dataset.*"])


def random_images(count, channels, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def small_pixels(count=10, size=6, augment=Augment("crop_flip", 2)):  # noqa: B008, Augment is frozen
    images = torch.from_numpy(random_images(count, 3, size))
    return Pixels(images, torch.arange(count), *mean_std(count_levels([images])), augment)


def raw(pixels):
    """The uint8 images that normalised batches came from, and their labels."""
    images, labels = (torch.cat(parts) for parts in zip(*pixels.in_order(4), strict=True))
    images = (images * pixels.std[:, None, None] + pixels.mean[:, None, None]) * 255
    return images.round().to(torch.uint8), labels


def same_batches(left, right):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True))


# ---- files in the formats of the real sets


def write_cifar(folder, monkeypatch, name):
    """CIFAR pickles of 10 images a class (CIFAR-100: 2), whose checksums torchvision is told to expect."""
    source = getattr(torchvision.datasets, name)
    ten = name == "CIFAR10"
    num_classes, label_key = (10, "labels") if ten else (100, "fine_labels")
    base = folder / source.base_folder
    base.mkdir(parents=True)
    written = []

    def write(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return file, hashlib.md5((base / file).read_bytes()).hexdigest()

    def batch(file, seed):
        count = 20 if ten else 200
        images = random_images(count, 3, 32, seed)
        labels = [i % num_classes for i in range(count)]
        written.append((images, labels))
        return write(file, {"data": images.reshape(count, -1), label_key: labels})

    train = [batch(file, seed) for seed, (file, _) in enumerate(source.train_list)]
    test = [batch(file, 99) for file, _ in source.test_list]
    names = {source.meta["key"]: [f"class {i}" for i in range(num_classes)]}
    file, md5 = write(source.meta["filename"], names)
    monkeypatch.setattr(source, "train_list", train)
    monkeypatch.setattr(source, "test_list", test)
    monkeypatch.setattr(source, "meta", {**source.meta, "filename": file, "md5": md5})
    return written


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, name, compress=False):
    """MNIST's idx files, 40 + 10 images; compressed, as torchvision downloads them, or unpacked."""
    base = folder / name / "raw"
    base.mkdir(parents=True)
    checksums = []
    for part, count, seed in (("train", 40, 0), ("t10k", 10, 1)):
        images = random_images(count, 1, 28, seed)[:, 0]
        labels = np.arange(count, dtype=np.uint8) % 10
        for file, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = gzip.compress(idx(array)) if compress else idx(array)
            path = base / f"{part}-{file}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(content)
            checksums.append((path.name, hashlib.md5(content).hexdigest()))
    return checksums


def write_pictures(folder, count, size=8, suffix=".png", classes=("ant", "bee"), seed=0):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(random_images(count, 3, size, seed + label)):
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / name / f"{i:02d}{suffix}")


@pytest.fixture
def pictures(tmp_path):
    """train/ with 10 and test/ with 4 pictures of each of two classes."""
    write_pictures(tmp_path / "pictures" / "train", 10)
    write_pictures(tmp_path / "pictures" / "test", 4, seed=50)
    return tmp_path / "pictures"


def folder(root, **keys):
    return load("image_folder", **{"root": str(root), "pad": 2, "workers": 0, "cache_dir": None, **keys})


# ---- augmentation


@pytest.mark.parametrize(("channels", "height", "width", "pad"), [(3, 5, 7, 2), (1, 8, 8, 1), (2, 3, 3, 4)])
def test_crop_flip_equals_torchvision_sample_by_sample(channels, height, width, pad):
    images = torch.randint(0, 256, (40, channels, height, width), dtype=torch.uint8)
    draws = Augment("crop_flip", pad).draw(40, seed=1)
    ours = crop_flip(images, draws.top, draws.left, draws.flip, pad)
    for image, out, top, left, flip in zip(images, ours, draws.top, draws.left, draws.flip, strict=True):
        theirs = TF.crop(TF.pad(image, [pad] * 4), int(top), int(left), height, width)
        assert torch.equal(out, TF.hflip(theirs) if flip else theirs)


@pytest.mark.parametrize(("kind", "flips"), [("crop", (0.0,)), ("crop_flip", (0.0, 1.0))])
def test_outcomes_are_as_frequent_as_those_of_torchvision(kind, flips):
    image = torch.arange(1, 5, dtype=torch.uint8).view(1, 2, 2)
    expected = {}  # outcome -> probability, over all that RandomCrop(2, padding=1) and the flip can do
    for top in range(3):
        for left in range(3):
            for flip in flips:
                out = TF.crop(TF.pad(image, [1] * 4), top, left, 2, 2)
                key = tuple((TF.hflip(out) if flip else out).flatten().tolist())
                expected[key] = expected.get(key, 0) + 1 / (9 * len(flips))
    augment, count = Augment(kind, 1), 20_000
    outcomes = augment(image.expand(count, 1, 2, 2), augment.draw(count, seed=0)).flatten(1)
    seen, times = outcomes.unique(dim=0, return_counts=True)
    seen = dict(zip(map(tuple, seen.tolist()), times.tolist(), strict=True))
    assert seen.keys() == expected.keys()
    assert chisquare([seen[key] for key in expected], [count * p for p in expected.values()]).pvalue > 0.01


def test_no_augmentation_leaves_images_alone():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(Augment("none", 4)(images, Augment("none", 4).draw(4, seed=0)), images)


def test_order_is_the_same_for_every_augmentation():
    orders = [Augment(kind, 2).draw(50, seed=3).order for kind in ("none", "crop", "crop_flip")]
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[1], orders[2])


@pytest.mark.parametrize(("kind", "pad"), [("flip", 4), (None, 4), ("crop", 0), ("crop_flip", 1.5)])
def test_unknown_augmentation_is_refused(kind, pad):
    with pytest.raises(ValueError, match=r"write .*none"):
        Augment(kind, pad)


# ---- epochs


def test_epoch_is_a_pure_function_of_its_seed():
    pixels = small_pixels()
    first = list(pixels.epoch(4, seed=7))
    torch.rand(3)
    assert same_batches(first, pixels.epoch(4, seed=7))
    assert not torch.equal(first[0][0], next(pixels.epoch(4, seed=8))[0])


def test_epochs_that_interleave_do_not_disturb_each_other():
    pixels = small_pixels()
    alone = list(pixels.epoch(2, seed=1))
    both = list(zip(pixels.epoch(2, seed=1), pixels.epoch(2, seed=2), strict=True))
    assert same_batches(alone, [left for left, _ in both])


def test_epoch_leaves_the_global_generator_alone(pictures):
    for train in (small_pixels(), folder(pictures, in_memory_limit=0).train):
        before = torch.get_rng_state()
        list(train.epoch(4, seed=0))
        list(train.in_order(4))
        assert torch.equal(torch.get_rng_state(), before)


def test_epoch_sees_each_image_once_and_drops_the_incomplete_batch():
    labels = torch.cat([labels for _, labels in small_pixels(10).epoch(4, seed=0)])
    assert len(labels) == 8 and len(labels.unique()) == 8


def test_batches_are_normalised_float32_in_channels_last():
    pixels = small_pixels(augment=Augment())
    images, labels = next(pixels.epoch(4, seed=0))
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    expected = TF.normalize(pixels.images[labels] / 255, pixels.mean.tolist(), pixels.std.tolist())
    torch.testing.assert_close(images, expected)


def test_in_order_is_whole_unaugmented_and_limited():
    pixels = small_pixels(10)
    images, labels = raw(pixels)
    assert torch.equal(images, pixels.images) and torch.equal(labels, pixels.labels)
    assert [len(batch) for _, batch in pixels.in_order(4)] == [4, 4, 2]
    assert [len(batch) for _, batch in pixels.in_order(4, limit=5)] == [4, 1]
    assert [len(batch) for _, batch in pixels.in_order(4, limit=99)] == [4, 4, 2]
    assert torch.cat([labels for _, labels in pixels.in_order(4, limit=5)]).tolist() == pixels.labels[::2].tolist()


@pytest.mark.parametrize("batch_size", [11, 0])
def test_batch_size_without_a_full_batch_is_refused_at_once(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} .* 10 training images.* from 1 to 10"):
        small_pixels(10).epoch(batch_size, seed=0)


def test_mean_and_std_are_exact():
    images = torch.from_numpy(random_images(50, 3, 9))
    mean, std = mean_std(count_levels(images.split(7)))
    reference = images.double() / 255
    assert torch.equal(mean, reference.mean(dim=(0, 2, 3)).float())
    torch.testing.assert_close(std, reference.std(dim=(0, 2, 3), correction=0).float(), rtol=1e-7, atol=0)


def test_channel_of_one_value_is_refused():
    with pytest.raises(ValueError, match="channel 1 is 9"):
        mean_std(count_levels([torch.tensor([[0, 9], [3, 9]], dtype=torch.uint8).view(2, 2, 1, 1)]))


def test_training_images_have_zero_mean_and_unit_variance():
    train = load("synthetic").train
    images = torch.cat([images for images, _ in train.in_order(500)]).double()
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-6)


# ---- batches in one pass


@pytest.fixture
def feed(native):
    """The C++ with the signature of `plain`."""

    def made(images, draws, augment, mean, std):
        return torch.ops.brqat.feed(images, *draws, augment.reach, value_table(mean, std))

    return made


def any_statistics(channels):
    generator = torch.Generator().manual_seed(channels)
    return torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1


AUGMENTS = [UNCHANGED, *(Augment(kind, pad) for kind in ("crop", "crop_flip") for pad in (1, 2, 3, 4, 9))]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("augment", AUGMENTS, ids=lambda a: f"{a.kind}-{a.pad}")
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 5, 7), (1, 9, 4), (2, 6, 3), (5, 1, 1), (4, 8, 8)])
def test_one_pass_equals_plain_to_the_last_bit(feed, shape, augment, threads):
    images = torch.randint(0, 256, (70, *shape), dtype=torch.uint8)
    statistics = any_statistics(shape[0])
    draws = augment.draw(70, seed=4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch_size in (1, 64):
            for batch in draws.batches(batch_size):
                ours, theirs = (way(images, batch, augment, *statistics) for way in (feed, plain))
                assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
                assert ours.stride() == theirs.stride()
    finally:
        torch.set_num_threads(before)


def test_one_pass_meets_every_pixel_value_and_every_corner(feed):
    """With statistics of real pictures; images of any memory format, as they come from files and from indexing."""
    augment = Augment("crop_flip", 2)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    top, left, flip = torch.cartesian_prod(torch.arange(5), torch.arange(5), torch.arange(2)).T.contiguous()
    draws = Draws(torch.zeros(50, dtype=torch.int64), top, left, flip.bool())
    statistics = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = plain(images, draws, augment, *statistics)
    last, step = images.to(memory_format=torch.channels_last), images.repeat_interleave(2, dim=3)[..., ::2]
    for way in (images, last, step):
        assert torch.equal(feed(way, draws, augment, *statistics), expected)


def test_epochs_and_evaluations_are_those_of_plain_torch(feed, monkeypatch):
    pixels = small_pixels(30)
    epoch, in_order, some = list(pixels.epoch(7, seed=3)), list(pixels.in_order(7)), list(pixels.in_order(7, limit=9))
    called = []
    monkeypatch.setattr("brqat.dataset.pixels.plain", lambda *given: called.append(1) or plain(*given))
    kernels.choose("torch", torch.device("cpu"))
    assert same_batches(epoch, pixels.epoch(7, seed=3)) and same_batches(in_order, pixels.in_order(7))
    assert same_batches(some, pixels.in_order(7, limit=9))
    assert len(called) == 4 + 5 + 2


@pytest.mark.parametrize("name, wrong", [("order", 10), ("order", -1), ("top", 5), ("top", -1), ("left", 5)])
def test_draw_outside_the_set_is_an_error_not_a_crash(feed, name, wrong):
    images = torch.zeros(10, 3, 6, 6, dtype=torch.uint8)
    draws = Augment("crop_flip", 2).draw(10, seed=0)
    getattr(draws, name)[3] = wrong
    with pytest.raises(IndexError, match=rf"image {wrong} of 10" if name == "order" else rf"corner.*{wrong}.*pad 2"):
        feed(images, draws, Augment("crop_flip", 2), *any_statistics(3))


def test_tensors_that_feed_cannot_read_are_refused(feed):
    images, draws = torch.zeros(4, 3, 6, 6, dtype=torch.uint8), Draws.unchanged(torch.arange(4))
    for wrong_images in (images.float(), images[0]):
        with pytest.raises(RuntimeError, match=r"images \(N, C, H, W\) of uint8"):
            feed(wrong_images, draws, UNCHANGED, *any_statistics(3))
    with pytest.raises(RuntimeError, match=r"table \(C, 256\)"):
        feed(images, draws, UNCHANGED, *any_statistics(2))
    strided = torch.zeros(8, dtype=torch.int64)[::2]
    for wrong in ({"order": draws.order.int()}, {"flip": draws.flip[:3]}, {"top": strided}):
        with pytest.raises(RuntimeError, match=r"draws \(B,\)|expected scalar type Long"):
            feed(images, draws._replace(**wrong), UNCHANGED, *any_statistics(3))
    assert feed(images, Draws.unchanged(torch.arange(0)), UNCHANGED, *any_statistics(3)).shape == (0, 3, 6, 6)


# ---- splits


def test_stratified_takes_the_fraction_of_every_class_and_loses_nothing():
    labels = torch.arange(300) % 3
    labels[:60] = 2
    rest, part = stratified(labels, 0.2, seed=0)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(300))
    assert torch.equal(rest, rest.sort().values) and torch.equal(part, part.sort().values)
    for label in range(3):
        assert (labels[part] == label).sum() == round(int((labels == label).sum()) * 0.2)


def test_stratified_hangs_on_its_seed_alone():
    labels = torch.arange(100) % 5
    first = stratified(labels, 0.2, seed=0)[1]
    torch.rand(1)
    assert torch.equal(stratified(labels, 0.2, seed=0)[1], first)
    assert not torch.equal(stratified(labels, 0.2, seed=1)[1], first)


def test_class_too_small_to_split_is_named():
    labels = torch.tensor([0] * 10 + [1] * 2)
    with pytest.raises(ValueError, match=r"class 'rare' has 2 images.*val_fraction=0.1 sets 0"):
        stratified(labels, 0.1, seed=0, classes=["common", "rare"])
    with pytest.raises(ValueError, match="class 'absent' has 0 images"):
        stratified(labels, 0.5, seed=0, classes=["common", "rare", "absent"])


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6, 1])
def test_validation_split_cannot_be_empty_or_most_of_it(fraction):
    with pytest.raises(ValueError, match=r"val_fraction=.*steers the sweep.*dataset.val_fraction=0.1"):
        load("digits", val_fraction=fraction)


# ---- digits, synthetic


def test_digits_are_read_as_scikit_learn_reads_them(monkeypatch):
    theirs = load_digits()
    for found in (digits.read(), without_their_file(monkeypatch)):
        for ours, wanted in zip(found, (theirs.images, theirs.target), strict=True):
            assert ours.dtype == wanted.dtype and np.array_equal(ours, wanted)


def without_their_file(monkeypatch):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    return digits.read()


def test_digits_are_exact_and_their_test_set_is_fixed():
    splits, other = load("digits"), load("digits", val_fraction=0.3, split_seed=5)
    assert (splits.num_classes, splits.channels, splits.image_size) == (10, 1, 8)
    assert splits.classes == tuple("0123456789")
    assert [len(part) for part in splits[:3]] == [1146, 201, 450]
    assert torch.equal(splits.test.images, other.test.images)
    assert set(splits.train.images.unique().tolist()) <= {15 * value for value in range(17)}
    assert splits.fingerprint != other.fingerprint


def test_no_image_is_in_two_splits():
    splits = load("synthetic")
    images = torch.cat([part.images for part in splits[:3]]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 2500


def test_only_training_images_are_augmented():
    splits = load("synthetic", augment="crop_flip")
    assert splits.train.augment == Augment("crop_flip", 2)
    assert splits.val.augment == splits.test.augment == Augment()


def test_synthetic_can_be_learned_but_not_perfectly():
    splits = load("synthetic")
    (train, train_labels), (test, test_labels) = (next(part.in_order(9999)) for part in (splits.train, splits.test))
    features = [torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) for x in (train, test)]
    weight = torch.linalg.lstsq(features[0], torch.nn.functional.one_hot(train_labels).float()).solution
    assert 0.7 < ((features[1] @ weight).argmax(1) == test_labels).float().mean() < 0.99


def test_synthetic_takes_its_shape_from_the_keys():
    keys = dict(num_classes=3, channels=1, image_size=10, images=60, test_images=9, val_fraction=0.1)
    splits = load("synthetic", **keys)
    assert (splits.num_classes, splits.channels, splits.image_size) == (3, 1, 10)
    assert [len(part) for part in splits[:3]] == [54, 6, 9]
    with pytest.raises(ValueError, match="test_images=2"):
        load("synthetic", **{**keys, "test_images": 2})


def test_fingerprint_tells_data_split_and_augmentation_apart():
    variants = [{}, {"seed": 1}, {"split_seed": 1}, {"val_fraction": 0.1}, {"augment": "crop"}]
    prints = [load("synthetic", **variant).fingerprint for variant in variants]
    assert len(set(prints)) == len(prints) and prints[0] == load("synthetic").fingerprint
    assert len(prints[0]) == 64


def test_splits_move_as_a_whole():
    moved = load("synthetic").to("meta")
    assert {part.images.device.type for part in moved[:3]} == {"meta"}


# ---- torchvision's sets


@pytest.mark.parametrize(("option", "name"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar_pickles_load(tmp_path, monkeypatch, option, name):
    *train, (test_images, test_labels) = write_cifar(tmp_path, monkeypatch, name)
    splits = load(option, root=str(tmp_path), val_fraction=0.5)
    assert (splits.num_classes, splits.channels, splits.image_size) == (len(splits.classes), 3, 32)
    assert splits.num_classes == (10 if option == "cifar10" else 100)
    assert torch.equal(splits.test.images, torch.from_numpy(test_images))
    assert splits.test.labels.tolist() == test_labels
    everything = np.concatenate([images for images, _ in train])
    loaded = torch.cat([splits.train.images, splits.val.images]).numpy()
    assert sorted(map(bytes, loaded)) == sorted(map(bytes, everything))
    assert splits.train.augment == Augment("crop_flip", 4)


def test_mnist_archives_are_checked_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", write_mnist(tmp_path, "MNIST", compress=True))
    splits = load("mnist", root=str(tmp_path), val_fraction=0.25)
    assert (splits.num_classes, splits.channels, splits.image_size) == (10, 1, 28)
    assert [len(part) for part in splits[:3]] == [30, 10, 10]
    assert torch.equal(splits.test.images, torch.from_numpy(random_images(10, 1, 28, seed=1)))
    assert splits.train.augment.kind == "none"


def test_unpacked_fashion_mnist_loads(tmp_path):
    write_mnist(tmp_path, "FashionMNIST")
    splits = load("fashion_mnist", root=str(tmp_path), val_fraction=0.25)
    assert splits.classes[0] == "T-shirt/top" and len(splits.val) == 10


def no_network(*args, **kwargs):
    raise URLError("no network")


def test_wrong_checksum_is_refused_with_the_remedy(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"damaged")
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(ValueError, match=rf"cannot load CIFAR10: .*no network(.|\n)*Put cifar-10.*{tmp_path}"):
        load("cifar10", root=str(tmp_path))


def test_missing_and_truncated_mnist_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", no_network)
    remedy = rf"cannot load MNIST: (.|\n)*Put train-images-idx3-ubyte.gz.*{tmp_path}/MNIST/raw"
    with pytest.raises(ValueError, match=remedy):
        load("mnist", root=str(tmp_path))
    (tmp_path / "MNIST" / "raw").rmdir()
    (tmp_path / "MNIST").rmdir()
    write_mnist(tmp_path, "MNIST")
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(ValueError, match=remedy):
        load("mnist", root=str(tmp_path))


# ---- image folders


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_lossless_folder_loads_to_the_last_pixel(tmp_path, suffix):
    write_pictures(tmp_path / "train", 10, suffix=suffix)
    write_pictures(tmp_path / "test", 4, suffix=suffix, seed=50)
    splits = folder(tmp_path)
    assert (splits.num_classes, splits.channels, splits.image_size) == (2, 3, 8)
    assert splits.classes == ("ant", "bee")
    assert [len(part) for part in splits[:3]] == [18, 2, 8]
    expected = np.concatenate([random_images(4, 3, 8, 50), random_images(4, 3, 8, 51)])
    assert torch.equal(splits.test.images, torch.from_numpy(expected))
    assert splits.test.labels.tolist() == [0] * 4 + [1] * 4


def test_folder_without_train_and_test_is_split_in_three(tmp_path):
    write_pictures(tmp_path, 20)
    splits = folder(tmp_path, test_fraction=0.25, val_fraction=0.2)
    assert [len(part) for part in splits[:3]] == [24, 6, 10]
    images = torch.cat([part.images for part in splits[:3]]).flatten(1)
    assert len(images.unique(dim=0)) == 40
    with pytest.raises(ValueError, match="test_fraction=0 "):
        folder(tmp_path, test_fraction=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_equals_memory_pixel_for_pixel(pictures, workers):
    keys = dict(val_fraction=0.2, augment="crop_flip")
    memory, files = folder(pictures, **keys), folder(pictures, in_memory_limit=0, workers=workers, **keys)
    assert isinstance(memory.train, Pixels) and isinstance(files.train, Files)
    assert memory[3:] == files[3:]
    assert same_batches(memory.train.epoch(4, seed=2), files.train.epoch(4, seed=2))
    for left, right in zip(memory[:3], files[:3], strict=True):
        assert len(left) == len(right)
        assert same_batches(left.in_order(3), right.in_order(3))
        assert same_batches(left.in_order(3, limit=2), right.in_order(3, limit=2))
    with pytest.raises(ValueError, match="batch_size=17"):
        files.train.epoch(17, seed=0)


def test_streamed_batches_arrive_on_the_device(pictures):
    train = folder(pictures, in_memory_limit=0).to("meta").train
    images, labels = next(train.epoch(4, seed=0))
    assert images.device.type == labels.device.type == "meta"


def test_resized_is_torchvisions_pixel_for_pixel():
    random = np.random.default_rng(0)
    for _ in range(300):
        height, width, size = (int(n) for n in random.integers(1, 60, 3))
        shape = (height, width, 3) if random.integers(2) else (height, width)
        picture = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        ours, theirs = resized(picture, size), TF.center_crop(TF.resize(picture, size), size)
        assert np.array_equal(np.array(ours), np.array(theirs)), (height, width, size)


def test_shorter_side_is_resized_and_the_centre_cut_out(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200  # the centre square
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(wide + i).save(tmp_path / name / f"{i}.png")
    splits = folder(tmp_path, image_size=10, val_fraction=0.5, test_fraction=0.5)
    assert splits.train.images.shape[1:] == (3, 10, 10) and splits.train.images.min() >= 200
    assert folder(tmp_path, image_size=5, val_fraction=0.5, test_fraction=0.5).image_size == 5
    with pytest.raises(ValueError, match=r"30 x 10 pixels .* set dataset.image_size"):
        folder(tmp_path, val_fraction=0.5, test_fraction=0.5)


def test_gray_and_colour_pictures_read_as_channels_says(pictures):
    gray = random_images(1, 1, 8)[0, 0]
    Image.fromarray(gray).save(pictures / "test" / "ant" / "00.png")
    assert torch.equal(folder(pictures).test.images[0], torch.from_numpy(gray).expand(3, 8, 8))
    splits = folder(pictures, channels=1)
    assert splits.channels == 1 and torch.equal(splits.test.images[0], torch.from_numpy(gray)[None])


def test_jpeg_reads_as_pil_does(tmp_path):
    write_pictures(tmp_path, 10, suffix=".jpg")
    splits = folder(tmp_path)
    index = stratified(torch.arange(20) // 10, 0.2, seed=0)[1][0]
    with Image.open(tmp_path / "ant" / f"{index:02d}.jpg") as picture:
        expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(splits.test.images[0], expected)


def test_corrupt_picture_is_named(pictures):
    path = pictures / "train" / "bee" / "03.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"cannot read the picture {path}"):
        folder(pictures)
    with pytest.raises(ValueError, match=rf"cannot read the picture {path}"):
        for part in folder(pictures, in_memory_limit=0, workers=2)[:3]:
            list(part.in_order(4))


def test_sixteen_bit_picture_is_refused_rather_than_clipped(pictures):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(pictures / "train" / "ant" / "05.png")
    with pytest.raises(ValueError, match=r"05.png: mode I.* convert it to 8"):
        folder(pictures)


def test_pictures_of_two_sizes_are_both_named(pictures):
    Image.new("RGB", (9, 9)).save(pictures / "train" / "bee" / "04.png")
    with pytest.raises(ValueError, match=r"bee/04.png has 9 x 9 .*ant/00.png has 8 x 8.*set dataset.image_size"):
        folder(pictures)
    assert folder(pictures, image_size=8).image_size == 8


def test_folders_of_another_layout_are_refused(tmp_path, pictures):
    for root in (None, "???"):
        with pytest.raises(ValueError, match=r"write dataset.root=FOLDER.*train/CLASS"):
            load("image_folder", root=None, cache_dir=None) if root is None else folder(root)
    with pytest.raises(ValueError, match=r"nowhere is not a folder.*train/CLASS"):
        folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"0 class folders \(none\)"):
        folder(tmp_path / "empty")
    (pictures / "test" / "cow").mkdir()
    with pytest.raises(ValueError, match="cow holds no picture"):
        folder(pictures)
    Image.new("RGB", (8, 8)).save(pictures / "test" / "cow" / "0.png")
    with pytest.raises(ValueError, match="same classes; only one has cow"):
        folder(pictures)
    (pictures / "test").rename(pictures / "val")
    with pytest.raises(ValueError, match="holds train/ but not the other"):
        folder(pictures)
    with pytest.raises(ValueError, match="channels=4"):
        folder(pictures, channels=4)


def test_other_files_are_skipped_with_a_warning(pictures, caplog):
    (pictures / "train" / "ant" / "notes.txt").write_text("seen")
    (pictures / "train" / "ant" / ".DS_Store").write_text("unseen")
    (pictures / "val").mkdir()
    assert len(folder(pictures).train) == 18
    assert "1 entries are not pictures" in caplog.text and "notes.txt" in caplog.text
    assert "DS_Store" not in caplog.text and "val is not read" in caplog.text


# ---- the cache of decoded pixels


def test_cache_spares_the_decoding(pictures, tmp_path, monkeypatch):
    keys = dict(cache_dir=str(tmp_path / "cache"))
    for limit in (2048, 0):
        first = folder(pictures, in_memory_limit=limit, **keys)
        with monkeypatch.context() as patch:
            patch.setattr("brqat.dataset.files.Pictures.stream", None)
            second = folder(pictures, in_memory_limit=limit, **keys)
        assert first.fingerprint == second.fingerprint
        assert same_batches(first.test.in_order(3), second.test.in_order(3))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".npz", ".npz"]


def test_changed_picture_is_decoded_anew(pictures, tmp_path):
    keys = dict(cache_dir=str(tmp_path / "cache"))
    first = folder(pictures, **keys)
    Image.new("RGB", (8, 8), "red").save(pictures / "test" / "ant" / "00.png")
    second = folder(pictures, **keys)
    assert second.test.images[0].flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("damage", ["truncated", "empty", "a byte of the pixels"])
def test_damaged_cache_is_rebuilt_with_a_warning(pictures, tmp_path, caplog, damage):
    keys = dict(cache_dir=str(tmp_path / "cache"))
    first = folder(pictures, **keys)
    (path,) = (tmp_path / "cache").iterdir()
    whole = bytearray(path.read_bytes())
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes({"truncated": whole[:-500], "empty": b""}.get(damage, changed))
    second = folder(pictures, **keys)
    assert f"{path} is damaged" in caplog.text and path.read_bytes() == whole
    assert same_batches(first.train.in_order(4), second.train.in_order(4))


def test_cache_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert cache.cached(tmp_path / "file" / "x.npz", lambda: np.arange(3)).tolist() == [0, 1, 2]
    assert "cannot keep" in caplog.text


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", no_network)
    with pytest.raises(URLError):
        cache.write(tmp_path / "x.npz", np.arange(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_epoch_on_the_gpu_equals_the_epoch_on_the_cpu(pictures):
    for train in (small_pixels(), folder(pictures, in_memory_limit=0).train):
        for (a, b), (c, d) in zip(train.epoch(4, seed=0), train.to("cuda").epoch(4, seed=0), strict=True):
            torch.testing.assert_close(a, c.cpu())
            assert torch.equal(b, d.cpu())
