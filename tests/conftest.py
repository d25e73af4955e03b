import os
from functools import partial

import pytest
import torch
from torch import nn

from brqat import kernels
from brqat.layers import Makers, Scheme, calibrate, quantize
from brqat.quantizer.lsq import LSQ

# The suite runs on two cores, often several processes at once.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def lsq_scheme(bits=2, first_last=8, per_channel=False) -> Scheme:
    def makers(width):
        weight = partial(LSQ, kind="weight", bits=width, per_channel=per_channel)
        return Makers(weight, partial(LSQ, kind="act", bits=width))

    return Scheme(makers(bits), None if first_last is None else makers(first_last))


class TinyNet(nn.Module):
    """Two convs, BatchNorm, one ReLU module called at two sites, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.conv2(x))
        return self.fc(self.conv3(x).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def plain_kernels():
    """A run chooses its kernels for the process: the next test begins with the reference again."""
    yield
    kernels.choose("torch", torch.device("cpu"))


@pytest.fixture
def native():
    """The C++ kernels in use, built if need be."""
    try:
        kernels.choose("native", torch.device("cpu"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["torch", "native"])
def each_kernels(request):
    """The test runs with plain PyTorch, and with the C++ kernels."""
    if request.param == "native":
        request.getfixturevalue("native")


@pytest.fixture
def pictures():
    return torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(pictures):
    """A calibrated W2A2 TinyNet."""
    torch.manual_seed(0)
    model = TinyNet()
    quantize(model, pictures, lsq_scheme())
    calibrate(model, [pictures, pictures + 0.1])
    return model
