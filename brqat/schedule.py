"""What changes over a run, as pure functions of progress in [0, 1]."""

import math
from collections.abc import Callable


def cosine_lr(progress: float, warmup: float = 0.0) -> float:
    """Share of the base learning rate: linear up to 1 over the first `warmup` of the run, then a half cosine to 0.

    Loshchilov and Hutter, "SGDR", ICLR 2017, Eq. 5, without restarts.
    """
    if progress < warmup or warmup >= 1:  # a run that is over before its warmup never comes to the cosine
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def constant(progress: float) -> float:
    """Full strength from the first regularized step."""
    return 1.0


def ramp(progress: float) -> float:
    """Linear from 0 to full strength."""
    return progress


def cosine(progress: float) -> float:
    """Half a cosine from 0 to full strength: slow at both ends."""
    return 0.5 * (1 - math.cos(math.pi * progress))


LAMBDA_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "ramp": ramp, "cosine": cosine}
