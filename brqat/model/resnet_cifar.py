"""The CIFAR ResNets: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
section 4.2, https://arxiv.org/abs/1512.03385

    y = F(x) + x                        Eq. 1, F two 3x3 convolutions; a ReLU follows
    depth = 6n + 2                      a stem, three stages of n blocks, a linear layer

Shortcuts are the paper's option A: the identity, zero-padded where channels grow. They hold no parameters, so
resnet20 has 269,722 of them for 10 classes, the paper's 0.27M. (Option B, a 1x1 projection, has 272,474.)
"""

import torch.nn.functional as F
from torch import Tensor, nn

from brqat.model.activation import clip_relu
from brqat.model.residual import Sum


def padded_identity(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A: every `stride`-th position of x, then zero channels appended up to `channels`.

    (N, C, H, W) -> (N, channels, ceil(H/stride), ceil(W/stride))
    """
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, channels - x.shape[1]))


class BasicBlock(nn.Module):
    """(N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.join = Sum()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = padded_identity(x, self.conv1.out_channels, self.conv1.stride[0])
        return self.relu2(self.join(out, shortcut))


class ResNetCIFAR(nn.Module):
    """(N, in_channels, H, W) -> logits (N, num_classes), for any H and W; the paper's are 32x32.

    Raises ValueError where depth is not 6n + 2 with n >= 1, and for a clip_value that clip_relu refuses.
    """

    def __init__(self, *, num_classes: int, in_channels: int, depth: int, clip_value: float | str | None) -> None:
        super().__init__()
        n, remainder = divmod(depth - 2, 6)
        if n < 1 or remainder:
            raise ValueError(
                f"depth={depth} is not 6n + 2: three stages of n blocks of two convolutions, a stem and a "
                "linear layer. Write depth=8, 14, 20, 32, 44, 56 or 110"
            )
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.stage1 = _stage(16, 16, n, stride=1)
        self.stage2 = _stage(16, 32, n, stride=2)
        self.stage3 = _stage(32, 64, n, stride=2)
        self.fc = nn.Linear(64, num_classes)

        # The paper's [13], "Delving Deep into Rectifiers", Eq. 10: std = sqrt(2 / fan_in). It is derived for
        # layers among ReLUs, so the linear layer keeps PyTorch's own start.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        clip_relu(self, clip_value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, 16, H, W)
        x = self.stage1(x)  # (N, 16, H, W)
        x = self.stage2(x)  # (N, 32, ceil(H/2), ceil(W/2))
        x = self.stage3(x)  # (N, 64, ceil(H/4), ceil(W/4))
        return self.fc(x.mean(dim=(2, 3)))  # (N, num_classes)


def _stage(in_channels: int, out_channels: int, n: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(n - 1)))
