"""Any image classifier of torchvision by its name, randomly initialized.

https://docs.pytorch.org/vision/stable/models.html
The networks are the ImageNet ones and divide the resolution by 32 or so. Most accept 32x32 pictures even so;
alexnet, inception_v3 and maxvit_t do not, and a vision transformer must be told: +model.image_size=32.
"""

import difflib
from typing import Any

from torch import nn

from brqat.model.activation import clip_relu


def from_torchvision(
    name: str, *, num_classes: int, in_channels: int, clip_value: float | str | None, **options: Any
) -> nn.Module:
    """A network (N, in_channels, H, W) -> logits (N, num_classes). `options` go to torchvision's constructor.

    Raises ValueError where torchvision has no classifier called `name`, and for a clip_value that clip_relu
    refuses.
    """
    from torchvision import models  # here, so that other models need no torchvision

    classifiers = models.list_models(module=models)  # leaves out detection, segmentation, video, quantization
    if name not in classifiers:
        raise ValueError(_unknown(name, classifiers, models.list_models()))
    if name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make forward return a tuple in training. init_weights=True is the default
        # without its warning.
        options |= {"aux_logits": False, "init_weights": True}
    model = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if name.startswith("densenet"):
        # DenseNet's last ReLU is a call of F.relu, out of clip_relu's reach. With a module before it the
        # network computes the same, and can be clipped.
        model.features.add_module("relu5", nn.ReLU(inplace=True))
    if in_channels != 3:
        _replace_first_conv(model, in_channels)
    return clip_relu(model, clip_value)


def _unknown(name: str, classifiers: list[str], every_model: list[str]) -> str:
    problem = "is not an image classifier" if name in every_model else "is not a model of torchvision"
    close = difflib.get_close_matches(name.lower(), classifiers)
    advice = " or ".join(close) if close else "mobilenet_v2, for example"
    every_name = "torchvision.models.list_models(module=torchvision.models)"
    return f"name={name!r} {problem}. Write model.name={advice}. All names: {every_name}"


def _replace_first_conv(model: nn.Module, in_channels: int) -> None:
    """Put a convolution with fresh weights, PyTorch's default, where the one that reads the picture was."""
    name, conv = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert conv.in_channels == 3 and conv.groups == 1, f"{name} does not read the picture"
    fresh = nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        bias=conv.bias is not None,
    )
    model.set_submodule(name, fresh)
