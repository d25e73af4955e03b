"""torchvision's ResNet-18 with the stem that CIFAR papers give it.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
https://arxiv.org/abs/1512.03385

The ImageNet stem divides the resolution by 4, which leaves a 32x32 picture 1x1 after the last stage. Here
conv1 is 3x3 with stride 1 and there is no max pooling, so the last stage ends at 4x4.
"""

from torch import Tensor, nn

from brqat.model.activation import clip_relu
from brqat.model.residual import Sum


class Block(nn.Module):
    """torchvision's BasicBlock with a ReLU of its own at each of the two places, and a module where the shortcut joins.

    (N, C, H, W) -> (N, C', H', W') as the block it is made of, with whose keys and layers.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = block.conv1, block.bn1, nn.ReLU()
        self.conv2, self.bn2 = block.conv2, block.bn2
        self.downsample = nn.Identity() if block.downsample is None else block.downsample
        self.join, self.relu2 = Sum(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(self.join(out, self.downsample(x)))


def resnet18(*, num_classes: int, in_channels: int, clip_value: float | str | None) -> nn.Module:
    """A network (N, in_channels, H, W) -> logits (N, num_classes), for any H and W, randomly initialized.

    Raises ValueError for a clip_value that clip_relu refuses.
    """
    from torchvision.models import resnet18 as imagenet_resnet18  # here, so other models need no torchvision

    model = imagenet_resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    model.maxpool = nn.Identity()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for position, block in enumerate(stage):
            stage[position] = Block(block)
    return clip_relu(model, clip_value)
