"""1-bit weights {-alpha, +alpha}: Rastegari, Ordonez, Redmon, Farhadi, "XNOR-Net", ECCV 2016.
https://arxiv.org/abs/1603.05279

    w_hat = alpha * sign(w),      alpha = mean|w|        Eq. 6: the alpha of least squared error

The paper computes alpha anew in every forward. Here Eq. 6 is its start and from then on it is learned like LSQ's,
d w_hat / d alpha = sign(w), so that the alpha policies mean the same at 1 bit as at 2. The gradient passes to w
unmasked: with a mask at |w| < alpha, two in five Gaussian weights would never move again.
"""

import torch
from torch import Tensor

from brqat.bins import as_float
from brqat.grid import SIGN_GRID, Grid
from brqat.quantizer.base import Quantized, Quantizer, gradient_scale


def sign_codes(v: Tensor) -> Tensor:
    """-1 or +1 as a float tensor; zero counts as positive, NaN stays NaN."""
    return torch.where(v.isnan(), v, torch.where(v < 0, -1.0, 1.0).to(v.dtype))


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, alpha, scale):
        codes = sign_codes(as_float(v))
        stored = codes.nan_to_num(-1).to(SIGN_GRID.dtype)  # NaN has no code: bin 0 shows it to the table
        ctx.save_for_backward(alpha, stored)
        ctx.scale = scale
        ctx.mark_non_differentiable(stored)
        ctx.set_materialize_grads(False)
        return (codes * alpha).to(v.dtype), stored

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None
        alpha, codes = ctx.saved_tensors
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_alpha = (as_float(grad) * codes).sum_to_size(alpha.shape).mul_(ctx.scale).to(alpha.dtype)
        return grad, grad_alpha, None


class Sign(Quantizer):
    """A 1-bit weight site."""

    def __init__(self, kind: str, bits: int = 1, per_channel: bool = False, start: str = "lsq"):
        if kind != "weight" or bits != 1:
            raise ValueError(
                f"quantizer=sign is for 1-bit weights, not for {kind} at bits={bits}: its codes are -1 and +1. "
                "Leave weight.bits at 1, or write quantizer=lsq."
            )
        super().__init__(kind, bits, per_channel, start)

    def grid_for(self, signed: bool) -> Grid:
        return SIGN_GRID

    def alpha_start(self, mean_abs: Tensor, grid: Grid) -> Tensor:
        return mean_abs

    def codes(self, v: Tensor, alpha: Tensor) -> Tensor:
        return sign_codes(as_float(v))

    def fake_quantize(self, v: Tensor) -> Quantized | tuple[Tensor, Tensor]:
        scale = gradient_scale(v, self.kind, self.alpha, 1)
        return self.one_pass(v, scale) or _Sign.apply(v, self.alpha, scale)
