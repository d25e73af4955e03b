"""How far the elements of each bin lie from their level: the one table behind BR, dampening and the metrics.

Bin i holds the elements whose code is i. Bin Regularization asks for the squared distance of the bin's mean
to its level plus the bin's variance (Han et al., ICCV 2021); with the biased variance that sum is exactly

    mse_i = 1/N_i * sum over the bin of (v - i * alpha)^2,        N_i its element count,

so the table needs no mean and no variance, and the gradients are one lookup per element:

    d mse_i / d v_j   =  2/N_i * (v_j - i * alpha)      for j in bin i, else 0
    d mse_i / d alpha = -2/N_i * sum over the bin of i * (v_j - i * alpha)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from brqat.grid import Grid
from brqat.kernels import Bins


class BinTable(NamedTuple):
    """One entry per level, lowest first, both (num_levels,)."""

    count: Tensor  # int64; elements in the bin
    mse: Tensor  # mean squared distance to the level, in units of v squared; 0 where the bin is empty


def bin_table(v: Tensor, codes: Tensor, alpha: Tensor, grid: Grid, drop_clipped: bool = False) -> BinTable:
    """Count and mean squared distance to the level per bin, differentiable in v and in alpha.

    v: values before quantization, any shape and float dtype.
    codes: the code of each value, v's shape, any real dtype; codes are constants to autograd.
    alpha: step size, broadcastable to v; several alphas (per channel) share the bins of their codes.
    drop_clipped: leave out the elements beyond the end levels, whose distance no rounding explains.

    Sums run in float64 and wait for nothing on the device. mse is float64 for float64 v, else float32.
    """
    index = bin_index(codes, grid)
    if drop_clipped:
        u = as_float(v.detach()) / alpha.detach()
        index = torch.where((u < grid.qn) | (u > grid.qp), grid.num_levels, index)
    return BinTable(*_BinTable.apply(v, alpha, codes, index, grid.num_levels))


def site_table(v: Tensor, codes: Tensor, alpha: Tensor, grid: Grid, bins: Bins) -> BinTable:
    """bin_table as a regularizer asks for it; in steps its distances are v / alpha - c."""
    if bins.in_steps:
        v, alpha = as_float(v) / alpha, torch.ones_like(alpha)
    return bin_table(v, codes, alpha, grid, bins.drop_clipped)


def bin_index(codes: Tensor, grid: Grid) -> Tensor:
    """Position of each code in the per-bin tables, int64, codes' shape.

    A code outside the grid can only come from a NaN. It is put into an end bin, where the NaN reaches mse and
    so the loss: an index out of range would kill the process on a GPU instead of ending the run as diverged.
    """
    index = codes.long().sub_(grid.qn)
    if grid.gap != 1:
        index = index.div_(grid.gap, rounding_mode="floor")
    return index.clamp_(0, grid.num_levels - 1)


def bin_sum(index: Tensor, values: Tensor, num_bins: int) -> Tensor:
    """Sum of the values in each bin, (num_bins,), in the dtype of values.

    index_add_ because it reads the data once whatever the number of levels; torch.bincount would stop a GPU.
    """
    if values.stride() != index.stride():
        values = values.expand_as(index).clone(memory_format=torch.contiguous_format)
        index = index.contiguous()
    zeros = torch.zeros(num_bins, dtype=values.dtype, device=values.device)
    return zeros.index_add_(0, as_it_lies(index), as_it_lies(values))


def bin_count(index: Tensor, num_bins: int) -> Tensor:
    """Number of elements in each bin, (num_bins,) int64."""
    zeros = torch.zeros(num_bins, dtype=torch.int64, device=index.device)
    ones = torch.ones((), dtype=torch.int64, device=index.device).expand(index.numel())
    return zeros.index_add_(0, as_it_lies(index), ones)


def as_it_lies(t: Tensor) -> Tensor:
    """Flat, in the order of memory where that is channels_last: a sum is free in its order, and a copy costs."""
    return (t.permute(0, 2, 3, 1) if _is_channels_last(t) else t).flatten()


def _is_channels_last(t: Tensor) -> bool:
    """And not in rows as well, which a tensor of one channel or one pixel is."""
    return t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], several times faster on a CPU, and in index's memory layout."""
    if _is_channels_last(index):
        return _look_up(table, index.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return table.index_select(0, index.flatten()).view(index.shape)


def as_float(v: Tensor) -> Tensor:
    """v in float32, or as it is in float64: bfloat16 misplaces values near half steps."""
    return v if v.dtype == torch.float64 else v.float()


class _BinTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, alpha, codes, index, num_levels):
        distance = as_float(v) - codes * alpha
        # One bin more than levels: it takes what drop_clipped leaves out.
        count = bin_count(index, num_levels + 1)[:num_levels]
        total = bin_sum(index, distance.double().square_(), num_levels + 1)[:num_levels]
        ctx.save_for_backward(v, alpha, codes, index, count)
        ctx.mark_non_differentiable(count)
        return count, (total / count.clamp(min=1)).to(distance.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, grad_mse):
        v, alpha, codes, index, count = ctx.saved_tensors
        distance = as_float(v) - codes * alpha
        lookup = torch.zeros(count.numel() + 1, dtype=distance.dtype, device=v.device)
        lookup[:-1] = 2 * grad_mse / count.clamp(min=1)
        # What is left out may be infinite, and 0 times that would be NaN.
        pull = _look_up(lookup, index).mul_(distance).masked_fill_(index == count.numel(), 0)
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            grad_alpha = -(pull * codes).sum_to_size(alpha.shape).to(alpha.dtype)
        return pull.to(v.dtype), grad_alpha, None, None, None
