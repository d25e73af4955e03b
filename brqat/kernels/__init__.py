"""The fast way: LSQ and the per-bin table in one pass over the data, instead of one per operation.

`kernels=auto|torch|native` chooses for the whole process. The plain PyTorch beside it (quantizer/lsq.py, bins.py) is
the reference: the same codes, and gradients that differ by rounding only.

    cpu     native/*.cpp, built once per machine and kept in the cache
    cuda    triton.py
"""

import logging
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
    codes: Tensor | None  # in the grid's dtype, v's shape
    count: Tensor | None  # (num_levels,) int64
    mse: Tensor | None  # (num_levels,) float32


_native_on: str | None = None  # the type of device that native kernels are in use for


def choose(choice: str, device: torch.device) -> str:
    """From here on this process uses the kernels of `choice`; returns torch or native, whichever that is.

    Raises ValueError for native where it cannot be had.
    """
    global _native_on
    _native_on = None
    if choice == "torch":
        log.info("kernels: plain PyTorch, as told")
        return "torch"
    try:
        if device.type == "cuda":
            import brqat.kernels.triton  # noqa: F401
        elif device.type == "cpu":
            from brqat.kernels import native

            native.load()
        else:
            raise RuntimeError(f"there are none for {device.type}")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if choice == "native":
            raise ValueError(f"kernels=native cannot be had here: {reason}. Write kernels=auto or torch.") from error
        log.warning("kernels: plain PyTorch (%s), since native ones cannot be had: %s", COST, reason)
        return "torch"
    _native_on = device.type
    log.info("kernels: native")
    return "native"


# Measured for ResNet-20 on two cores (docs/performance.md).
COST = "a step of ResNet-20 takes 3.3 times a float one's on a CPU, and 0.97 with native kernels"


def lsq(
    v: Tensor, alpha: Tensor, alpha_br: Tensor, grid: Grid, scale: float, codes: bool, bins: Bins | None
) -> OnePass | None:
    """Fake-quantized v with LSQ's gradients, and what else was asked for; None where the reference has to do it.

    v: any shape; alpha: one, or one per row of v. alpha_br: alpha again, or a copy without gradient, for what the table
    sends to it. scale: LSQ's g. mse is differentiable in v and alpha_br.
    """
    if v.device.type != _native_on or v.dtype not in (torch.float32, torch.bfloat16):
        return None
    if v.is_cuda:
        if grid.gap != 1 or not (alpha.numel() == 1 or alpha.shape[0] == v.shape[0]):
            return None
        from brqat.kernels import triton

        return OnePass(*triton.lsq(v, alpha, alpha_br, grid, scale, codes, bins))
    steps, drop = bins or (False, False)
    v_hat, stored, count, mse = torch.ops.brqat.lsq.default(
        v, alpha, alpha_br, grid.qn, grid.qp, grid.gap == 2, scale, codes, bins is not None, steps, drop
    )
    return OnePass(v_hat, stored if codes else None, count if bins else None, mse if bins else None)


def lsq_again(v: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
    """v_hat as lsq or norm_lsq gave it, to the last bit, and nothing of autograd."""
    return torch.ops.brqat.lsq_forward.default(v, alpha, *grid, grid.gap == 2, False, False, False, False)[0]


class Norm(NamedTuple):
    """A BatchNorm and the bounds of the activation after it: y = norm(x), r = min(max(y, low), high)."""

    weight: Tensor  # (C,), like all below
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float  # of the running statistics: the share of the new
    training: bool  # normalise by the batch and let the running statistics follow
    eps: float
    low: float
    high: float


def native_on(device: torch.device) -> bool:
    """Whether torch.ops.brqat is in use for tensors of the device: lsq, norm_lsq and feed."""
    return _native_on == device.type == "cpu"


def takes_norm(x: Tensor, alpha: Tensor, grid: Grid, training: bool) -> bool:
    """Whether norm_lsq can be called with these."""
    return (
        native_on(x.device)
        and x.dtype == torch.float32
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > (x.shape[1] if training else 0)  # one value per channel: BatchNorm says why not
        and alpha.numel() == 1
        and grid.gap == 1
        and (training or not torch.is_grad_enabled())
    )


def norm_lsq(
    x: Tensor,
    shortcut: Tensor | None,
    norm: Norm,
    alpha: Tensor,
    alpha_br: Tensor,
    grid: Grid,
    scale: float,
    bins: Bins | None,
) -> tuple[OnePass, Tensor | None]:
    """BatchNorm, a shortcut added, activation and lsq in one; r, what lsq quantizes, too where there is a shortcut.

    x, shortcut: (N, C, H, W). As lsq otherwise, of r; running_mean and running_var are updated in training, and bins
    are for training only.
    """
    bounds = norm.eps, norm.low, norm.high
    if not norm.training:
        assert bins is None, "tables are for training"
        running = norm.running_mean, norm.running_var
        v_hat, r = torch.ops.brqat.norm_lsq_eval.default(
            x, shortcut, norm.weight, norm.bias, *running, *bounds, alpha, grid.qn, grid.qp
        )
        return OnePass(v_hat, None, None, None), None if shortcut is None else r
    steps, drop = bins or (False, False)
    v_hat, r, mean, var, count, mse = torch.ops.brqat.norm_lsq.default(
        x,
        shortcut,
        norm.weight,
        norm.bias,
        *bounds,
        alpha,
        alpha_br,
        grid.qn,
        grid.qp,
        scale,
        bins is not None,
        steps,
        drop,
    )
    values = x.numel() // x.shape[1]
    torch.ops.brqat.update_statistics.default(norm.running_mean, norm.running_var, mean, var, norm.momentum, values)
    return OnePass(v_hat, None, count if bins else None, mse if bins else None), None if shortcut is None else r
