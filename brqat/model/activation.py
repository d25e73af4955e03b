"""ReLU with a ceiling: y = min(max(x, 0), c).

A bounded activation keeps a few large values from stretching the step size of a low-bit quantizer.
c = 6 is ReLU6: Krizhevsky, "Convolutional Deep Belief Networks on CIFAR-10", 2010,
https://www.cs.toronto.edu/~kriz/conv-cifar10-aug2010.pdf
"""

import math
from numbers import Real

from torch import nn


class ClippedReLU(nn.Hardtanh):
    """min(max(x, 0), ceiling), elementwise, any shape; nn.ReLU6 for any ceiling.

    The gradient is 1 strictly between 0 and the ceiling, and 0 at both ends and beyond.
    """

    def __init__(self, ceiling: float, inplace: bool = False) -> None:
        super().__init__(min_val=0.0, max_val=ceiling, inplace=inplace)

    def extra_repr(self) -> str:
        return f"ceiling={self.max_val:g}" + (", inplace=True" if self.inplace else "")


def clip_relu(model: nn.Module, clip_value: float | str | None) -> nn.Module:
    """Give every ReLU inside `model` the ceiling `clip_value`, in place; return `model`.

    "none" or None changes nothing: a ReLU stays a ReLU, and the ReLU6 of a MobileNet keeps its 6.
    Other activations (Hardswish, SiLU, GELU) are left alone, and so is a call of F.relu inside a forward,
    which cannot be reached.

    Raises ValueError where clip_value is neither none nor a positive number, and where no ReLU is found.
    """
    ceiling = _ceiling(clip_value)
    if ceiling is None:
        return model
    # With duplicates, because one ReLU may be registered under several names: all of them must go.
    relus = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.ReLU | nn.ReLU6 | ClippedReLU)
    ]
    if not relus:
        raise ValueError(
            f"clip_value={clip_value} finds no ReLU module to clip in {type(model).__name__}: it uses other "
            "activations, or calls F.relu in forward. Write clip_value=none, or choose another model"
        )
    for name, relu in relus:
        model.set_submodule(name, ClippedReLU(ceiling, inplace=relu.inplace))
    return model


def _ceiling(clip_value: float | str | None) -> float | None:
    if clip_value is None or clip_value == "none":
        return None
    is_number = isinstance(clip_value, Real) and not isinstance(clip_value, bool)  # True would pass for 1
    if not is_number or not math.isfinite(clip_value) or clip_value <= 0:
        raise ValueError(
            f"clip_value={clip_value!r} cannot be the ceiling of ReLU, which is a positive, finite number. "
            "Write clip_value=1, clip_value=6 or another such number, or clip_value=none for plain ReLU"
        )
    return float(clip_value)
