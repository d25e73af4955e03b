"""Five convolutions and a linear layer: the project's default, small enough to train in seconds on a CPU."""

from torch import Tensor, nn

from brqat.model.activation import clip_relu


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU: (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class SmallCNN(nn.Module):
    """(N, in_channels, H, W) -> logits (N, num_classes), for any H and W.

    The resolution halves twice: 8x8 digits still have 2x2 positions before the average, 32x32 pictures 8x8.

    Raises ValueError for a width below 1, and for a clip_value that clip_relu refuses.
    """

    def __init__(self, *, num_classes: int, in_channels: int, width: int, clip_value: float | str | None) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} leaves no channels. Write a positive integer, such as width=16")
        self.blocks = nn.Sequential(
            ConvBlock(in_channels, width, stride=1),
            ConvBlock(width, 2 * width, stride=2),
            ConvBlock(2 * width, 2 * width, stride=1),
            ConvBlock(2 * width, 4 * width, stride=2),
            ConvBlock(4 * width, 4 * width, stride=1),
        )
        self.fc = nn.Linear(4 * width, num_classes)
        clip_relu(self, clip_value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)  # (N, 4 * width, H/4, W/4)
        return self.fc(x.mean(dim=(2, 3)))  # (N, num_classes)
