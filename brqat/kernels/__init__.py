"""The fast way: LSQ and the per-bin table in one pass over the data, instead of one per operation.

`kernels=auto|torch|native` chooses for the whole process. The plain PyTorch beside it (quantizer/lsq.py, bins.py) is the
reference: the same codes, and gradients that differ by rounding only.

    cpu     native/*.cpp, built once per machine and kept in the cache
    cuda    triton.py
"""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from brqat.grid import Grid

log = logging.getLogger(__name__)

CHOICES = ("auto", "torch", "native")


class Bins(NamedTuple):
    """What a regularizer wants of a site's per-bin table."""

    in_steps: bool = False  # distances in units of alpha, (v / alpha - c)^2, rather than (v - c * alpha)^2
    drop_clipped: bool = False  # leave out what lies beyond the end levels


class OnePass(NamedTuple):
    """What one pass gives; None for what was not asked for."""

    v_hat: Tensor
    codes: Tensor | None  # int16, v's shape
    count: Tensor | None  # (num_levels,) int64
    mse: Tensor | None  # (num_levels,) float32


_chosen = "torch"


def choose(choice: str, device: torch.device, folder: Path) -> str:
    """From here on this process uses the kernels of `choice`; returns torch or native, whichever that is.

    folder: where a library built on this machine is kept. Raises ValueError for native where it cannot be had.
    """
    global _chosen
    _chosen = "torch"
    if choice == "torch":
        log.info("kernels: plain PyTorch")
        return _chosen
    try:
        if device.type == "cuda":
            import brqat.kernels.triton  # noqa: F401
        elif device.type == "cpu":
            from brqat.kernels import native

            native.load(folder)
        else:
            raise RuntimeError(f"there are none for {device.type}")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        if choice == "native":
            raise ValueError(f"kernels=native cannot be had here: {reason}. Write kernels=auto or torch.") from error
        log.warning("kernels: plain PyTorch, %s, since there are no native ones: %s", COST, reason)
        return _chosen
    _chosen = "native"
    log.info("kernels: native")
    return _chosen


COST = "about 1.8 times the training time"


def lsq(
    v: Tensor, alpha: Tensor, alpha_br: Tensor, grid: Grid, scale: float, codes: bool, bins: Bins | None
) -> OnePass | None:
    """Fake-quantized v with LSQ's gradients, and what else was asked for; None where the reference has to do it.

    v: any shape; alpha: one, or one per row of v. alpha_br: alpha again, or a copy without gradient, for what the table
    sends to it. scale: LSQ's g. mse is differentiable in v and alpha_br.
    """
    if _chosen == "torch" or v.dtype not in (torch.float32, torch.bfloat16):
        return None
    if v.is_cuda:
        from brqat.kernels import triton

        return OnePass(*triton.lsq(v, alpha, alpha_br, grid, scale, codes, bins))
    if not v.is_cpu:
        return None
    steps, drop = bins or (False, False)
    v_hat, stored, count, mse = torch.ops.brqat.lsq(
        v, alpha, alpha_br, grid.qn, grid.qp, grid.gap == 2, scale, codes, bins is not None, steps, drop
    )
    return OnePass(v_hat, stored if codes else None, *((count, mse) if bins else (None, None)))
