"""Learned Step Size Quantization. Esser, McKinstry, Bablani, Appuswamy, Modha; ICLR 2020.
https://arxiv.org/abs/1902.08153

    c     = round(clip(v / alpha, qn, qp))                                            Eq. 1
    v_hat = c * alpha                                                                 Eq. 2
    d v_hat / d alpha = c - v / alpha   where qn < v / alpha < qp,  else qn or qp     Eq. 3
    d v_hat / d v     = 1               where qn < v / alpha < qp,  else 0            Eq. 5

The mask is written out. torch.clamp's gradient at its bounds differs between torch releases, and Bin
Regularization pushes weights exactly onto qn * alpha and qp * alpha.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from brqat import kernels
from brqat.bins import BinTable, as_float
from brqat.grid import Grid, uniform_grid
from brqat.kernels import Norm
from brqat.quantizer.base import Quantized, Quantizer, Seen, gradient_scale


def lsq(v: Tensor, alpha: Tensor, grid: Grid, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Fake-quantized v in v's dtype, and its codes, in grid.dtype.

    v: any shape and float dtype; alpha: broadcastable to v, positive; scale: LSQ's g on alpha's gradient.
    Rounding is half to even, in float32 (float64 for float64 v) whatever the precision outside.
    """
    return _LSQ.apply(v, alpha, grid, scale)


def lsq_codes(v: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
    """Eq. 1, as a float tensor."""
    return (as_float(v) / alpha).clamp_(grid.qn, grid.qp).round_()


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, alpha, grid, scale):
        codes = lsq_codes(v, alpha, grid)
        stored = codes.nan_to_num(grid.qn).to(grid.dtype)  # NaN has no code: bin 0 shows it to the table
        ctx.save_for_backward(v, alpha, stored)
        ctx.grid, ctx.scale = grid, scale
        ctx.mark_non_differentiable(stored)
        ctx.set_materialize_grads(False)
        return codes.mul_(alpha).to(v.dtype), stored

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None
        v, alpha, codes = ctx.saved_tensors
        u = as_float(v) / alpha
        inside = (u > ctx.grid.qn) & (u < ctx.grid.qp)
        grad_v = grad * inside if ctx.needs_input_grad[0] else None
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, codes - u, codes.to(u.dtype))
            grad_alpha = (as_float(grad) * slope).sum_to_size(alpha.shape).mul_(ctx.scale).to(alpha.dtype)
        return grad_v, grad_alpha, None, None


class LSQ(Quantizer):
    """A uniform site, 2 to 8 bits, or 1 bit for values that are never negative."""

    def __init__(self, kind: str, bits: int, per_channel: bool = False, start: str = "lsq"):
        super().__init__(kind, bits, per_channel, start)
        self.grid_for(signed=kind == "weight")  # refuses an impossible width before any data is needed

    def grid_for(self, signed: bool) -> Grid:
        return uniform_grid(self.bits, signed)

    def codes(self, v: Tensor, alpha: Tensor) -> Tensor:
        return lsq_codes(v, alpha, self.grid)

    def fake_quantize(self, v: Tensor) -> Quantized | tuple[Tensor, Tensor]:
        scale = gradient_scale(v, self.kind, self.alpha, self.grid.qp)
        return self.one_pass(v, scale) or lsq(v, self.alpha, self.grid, scale)

    def after_norm(
        self, x: Tensor, shortcut: Tensor | None, training: bool, norm: Callable[[], Norm]
    ) -> tuple[Tensor, Tensor | None] | None:
        # Recording needs the values between, a hook the call, and the kernel knows no formula but this file's.
        own = (type(self).forward, type(self).fake_quantize) != (Quantizer.forward, LSQ.fake_quantize)
        hooked = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        if own or hooked or self.recording or not kernels.takes_norm(x, self.alpha, self.grid, training):
            return None
        asked = self.asked_now
        scale = gradient_scale(x, self.kind, self.alpha, self.grid.qp)
        bins = asked and asked.bins
        out, r = kernels.norm_lsq(x, shortcut, norm(), self.alpha, self.alpha_seen_by(asked), self.grid, scale, bins)
        if asked is not None:
            self.seen = Seen(x.shape, None, None, BinTable(out.count, out.mse))
        return out.v_hat, r
