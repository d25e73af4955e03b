"""torchvision's ResNet-18 with the stem that CIFAR papers give it.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
https://arxiv.org/abs/1512.03385

The ImageNet stem divides the resolution by 4, which leaves a 32x32 picture 1x1 after the last stage. Here
conv1 is 3x3 with stride 1 and there is no max pooling, so the last stage ends at 4x4.
"""

from torch import nn

from brqat.model.activation import clip_relu


def resnet18(*, num_classes: int, in_channels: int, clip_value: float | str | None) -> nn.Module:
    """A network (N, in_channels, H, W) -> logits (N, num_classes), for any H and W, randomly initialized.

    Raises ValueError for a clip_value that clip_relu refuses.
    """
    from torchvision.models import resnet18 as imagenet_resnet18  # here, so other models need no torchvision

    model = imagenet_resnet18(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    model.maxpool = nn.Identity()
    return clip_relu(model, clip_value)
