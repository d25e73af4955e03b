"""LSQ and the bin table of its codes in Triton: one pass over v forward, one over v and its gradient backward.

Esser et al., "Learned Step Size Quantization", ICLR 2020 (quantizer/lsq.py) and Han et al., "Improving Low-Precision
Network Quantization via Bin Regularization", ICCV 2021 (bins.py). With u = v / alpha, G = dL/dv_hat, M_i = dL/dmse_i:

    c       = round(clip(u, qn, qp)),    v_hat = c * alpha                               LSQ Eq. 1, 2
    mse_i   = 1/N_i * sum over bin i of (v - i * alpha)^2                                BR Eq. 4, 5
    p_j     = M_i * 2/N_i * (v_j - i * alpha),    i = c_j                                the pull of the bins on v_j
    dL/dv_j     = G_j * [qn < u_j < qp] + p_j                                            LSQ Eq. 5, BR
    dL/dalpha   = scale * sum of G_j * (c_j - u_j where qn < u_j < qp, else qn or qp)    LSQ Eq. 3
                  - sum of p_j * c_j                                                     BR

In steps the distance is u - i: its pull on u is p_j = M_i * 2/N_i * (u_j - i), the pull on v_j is p_j / alpha and the
second sum of dL/dalpha is - sum of p_j * u_j / alpha.

Every sum is taken per program and the programs' sums are added afterwards in float64: no atomics, so the same input
gives the same bits. The module needs the triton package, which has no wheel for macOS; nothing else imports it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from brqat.grid import Grid
from brqat.kernels import Bins

# Elements per program, and warps for them. A sum over some thousand float32 terms is good to a few 1e-7 of their
# magnitudes. Channels of a weight are often short: a large block would be mostly empty there.
SHORT_ROW, SMALL, LARGE = 1024, (256, 2), (4096, 8)


def lsq(
    v: Tensor, alpha: Tensor, alpha_br: Tensor, grid: Grid, scale: float, codes: bool, bins: Bins | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Fake-quantized v, and where asked for the codes in grid.dtype, and count and mse of the bins, both (num_levels,).

    v: any shape, float32 or shorter; alpha: float32, one number or (C, 1, ..) for the C rows of v, positive.
    alpha_br: alpha, or alpha.detach() where the bins are not to move it. scale: LSQ's g on alpha's gradient.
    v_hat and codes lie in memory as v does, if v fills its memory without gaps.
    A NaN stays one in v_hat and in mse; its stored code is qn.
    """
    assert grid.gap == 1, grid
    assert v.dtype in (torch.float32, torch.bfloat16, torch.float16), v.dtype
    assert alpha.dtype == torch.float32, alpha.dtype
    assert alpha.numel() == 1 or tuple(alpha.shape) == (v.shape[0],) + (1,) * (v.dim() - 1), (alpha.shape, v.shape)
    in_steps, drop_clipped = bins or (False, False)
    v_hat, stored, count, mse = _forward(
        v, alpha, alpha_br, grid.qn, grid.qp, scale, codes, bins is not None, in_steps, drop_clipped
    )
    return v_hat, stored if codes else None, count if bins else None, mse if bins else None


# Opaque custom ops with register_autograd, rather than an autograd.Function around triton_op: torch.compile then puts
# one node into its graph and traces neither the ctx nor the launches, the same code serves CUDA and, through
# Triton's interpreter, the CPU, and there is nothing around the kernels that Inductor could fuse into them anyway.
# An op must return tensors: what was not asked for comes back with no elements. alpha_br and scale are inputs for
# autograd's sake alone.
@torch.library.custom_op("brqat::lsq_triton", mutates_args=())
def _forward(
    v: Tensor,
    alpha: Tensor,
    alpha_br: Tensor,
    qn: int,
    qp: int,
    scale: float,
    codes: bool,
    bins: bool,
    in_steps: bool,
    drop_clipped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    v = _in_rows(v, alpha)
    v_hat, stored, count, mse = _forward_like(v, qn, qp, codes, bins)
    if v.numel() == 0:
        return v_hat, stored, count.zero_(), mse.zero_()
    row, per_row, block, warps = _tiling(v, alpha)
    programs, num_levels = alpha.numel() * per_row, qp - qn + 1
    counts = totals = None
    if bins:
        counts = torch.empty(programs, num_levels, dtype=torch.int32, device=v.device)
        totals = torch.empty(programs, num_levels, dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):  # Triton launches on the current device, wherever the tensors are
        # No fused multiply-add: it would skip the rounding of c * alpha, and the distances would not be the plain ones.
        _forward_kernel[(programs,)](
            v, alpha.contiguous(), v_hat, stored if codes else None, counts, totals, row, per_row,
            alpha.numel() > 1, qn, qp, in_steps, drop_clipped, block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    if bins:
        torch.sum(counts, 0, out=count)
        mse.copy_(totals.sum(0, dtype=torch.float64) / count.clamp(min=1))
    return v_hat, stored, count, mse


@_forward.register_fake
def _(v, alpha, alpha_br, qn, qp, scale, codes, bins, in_steps, drop_clipped):
    return _forward_like(_in_rows(v, alpha), qn, qp, codes, bins)


def _forward_like(v: Tensor, qn: int, qp: int, codes: bool, bins: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward's results, not yet filled."""
    dtype = Grid(qn, qp).dtype
    stored = torch.empty_like(v, dtype=dtype) if codes else v.new_empty(0, dtype=dtype)
    num_levels = qp - qn + 1 if bins else 0
    count = v.new_empty(num_levels, dtype=torch.int64)
    return torch.empty_like(v), stored, count, v.new_empty(num_levels, dtype=torch.float32)


@torch.library.custom_op("brqat::lsq_triton_backward", mutates_args=())
def _backward(
    grad: Tensor | None,
    grad_mse: Tensor | None,
    v: Tensor,
    alpha: Tensor,
    count: Tensor,
    qn: int,
    qp: int,
    scale: float,
    in_steps: bool,
    drop_clipped: bool,
    needs_v: bool,
    needs_alpha: bool,
    needs_alpha_br: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    v = _in_rows(v, alpha)
    grad_v, grad_alpha, grad_alpha_br = _backward_like(v, alpha, needs_v, needs_alpha, needs_alpha_br)
    if v.numel() == 0:
        return grad_v, grad_alpha.zero_(), grad_alpha_br.zero_()
    if grad is not None and not _lie_alike(grad, v):
        grad = torch.empty_like(v).copy_(grad)
    lookup = None
    if grad_mse is not None:
        lookup = 2 * grad_mse / count.clamp(min=1)  # (num_levels,)
    row, per_row, block, warps = _tiling(v, alpha)
    shape = (alpha.numel(), per_row)
    sums = torch.empty(shape, dtype=torch.float32, device=v.device) if needs_alpha else None
    sums_br = torch.empty(shape, dtype=torch.float32, device=v.device) if needs_alpha_br else None
    with torch.cuda.device_of(v):
        _backward_kernel[(alpha.numel() * per_row,)](
            v, alpha.contiguous(), grad, lookup, grad_v if needs_v else None, sums, sums_br, row, per_row,
            alpha.numel() > 1, qn, qp, in_steps, drop_clipped, block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    if needs_alpha:
        grad_alpha.copy_((sums.sum(1, dtype=torch.float64) * scale).view(alpha.shape))
    if needs_alpha_br:
        total = -sums_br.sum(1, dtype=torch.float64).view(alpha.shape)
        grad_alpha_br.copy_(total / alpha if in_steps else total)
    return grad_v, grad_alpha, grad_alpha_br


@_backward.register_fake
def _(
    grad, grad_mse, v, alpha, count, qn, qp, scale, in_steps, drop_clipped, needs_v, needs_alpha, needs_alpha_br
):  # fmt: skip
    return _backward_like(_in_rows(v, alpha), alpha, needs_v, needs_alpha, needs_alpha_br)


def _backward_like(v: Tensor, alpha: Tensor, *needs: bool) -> tuple[Tensor, ...]:
    """The backward's results for v, alpha and alpha_br, not yet filled."""
    return tuple(torch.empty_like(t) if n else t.new_empty(0) for t, n in zip((v, alpha, alpha), needs, strict=True))


def _save(ctx, inputs, output):
    v, alpha, _, *settings = inputs
    qn, qp, scale, _, bins, in_steps, drop_clipped = settings
    ctx.save_for_backward(v, alpha, output[2])
    ctx.settings, ctx.bins = (qn, qp, scale, in_steps, drop_clipped), bins
    ctx.set_materialize_grads(False)


def _grads(ctx, grad, _codes, _count, grad_mse):
    v, alpha, count = ctx.saved_tensors
    if not ctx.bins:
        grad_mse = None
    need_v, need_alpha, need_alpha_br = ctx.needs_input_grad[:3]
    needs = (
        need_v and not (grad is None and grad_mse is None),
        need_alpha and grad is not None,
        need_alpha_br and grad_mse is not None,
    )
    grads = (None, None, None)
    if any(needs):
        found = _backward(grad, grad_mse, v, alpha, count, *ctx.settings, *needs)
        grads = tuple(g if needed else None for g, needed in zip(found, needs, strict=True))
    return *grads, *[None] * 7


_forward.register_autograd(_grads, setup_context=_save)


def _in_rows(v: Tensor, alpha: Tensor) -> Tensor:
    """v itself where its memory has no gaps and, with an alpha per channel, holds one channel after the other."""
    dense = torch.empty_like(v)  # keeps v's strides exactly where they have no gaps
    if not _lie_alike(dense, v):
        v = dense.copy_(v)
    if alpha.numel() > 1 and v.numel() > 0 and v.stride(0) != v.numel() // v.shape[0]:
        v = v.contiguous()
    return v


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order; a dimension of 1 has no order."""
    return all(s == t or n == 1 for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def _tiling(v: Tensor, alpha: Tensor) -> tuple[int, int, int, int]:
    """Elements that share an alpha, programs for them, elements per program and its warps."""
    row = v.numel() // alpha.numel()
    block, warps = SMALL if row <= SHORT_ROW else LARGE
    return row, triton.cdiv(row, block), block, warps


# Adding and taking off 1.5 * 2^23 leaves a float32 below 2^22 without its fraction, rounded half to even: the codes
# need no function of one vendor's library, which Triton's interpreter could not run. Only the sign of a zero is lost.
_NO_FRACTION = tl.constexpr(12582912.0)


@triton.jit
def _place(row, per_row, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr):
    """Offset of each of the program's elements, whether it exists, and the channel."""
    program = tl.program_id(0).to(tl.int64)
    if PER_CHANNEL:
        channel = program // per_row
        start = (program % per_row) * BLOCK
        offset = channel * row + start
    else:
        channel = program * 0
        start = program * BLOCK
        offset = start
    lane = tl.arange(0, BLOCK)
    return offset + lane, start + lane < row, channel


@triton.jit
def _quantize(v_ptr, alpha_ptr, at, exists, channel, QN: tl.constexpr, QP: tl.constexpr):
    """v, alpha, u and c in float32."""
    v = tl.load(v_ptr + at, mask=exists, other=0.0).to(tl.float32)
    alpha = tl.load(alpha_ptr + channel)
    # The operator `/` is good to 2 ulp on a GPU, which near a half step is another code.
    u = tl.div_rn(v, alpha)
    # Comparisons, not min and max: a NaN passes through on every device.
    c = tl.where(u < QN, QN * 1.0, tl.where(u > QP, QP * 1.0, u))
    c = (c + _NO_FRACTION) - _NO_FRACTION
    return v, alpha, u, c


@triton.jit
def _bin(u, c, exists, QN: tl.constexpr, QP: tl.constexpr, DROP_CLIPPED: tl.constexpr):
    """Position of each element in the per-bin tables, -1 where it is in no bin. A NaN counts as qn."""
    index = tl.where(exists, tl.where(c == c, c - QN, 0.0).to(tl.int32), -1)
    if DROP_CLIPPED:
        index = tl.where((u < QN) | (u > QP), -1, index)
    return index


@triton.jit
def _distance(v, alpha, u, c, IN_STEPS: tl.constexpr):
    return u - c if IN_STEPS else v - c * alpha


@triton.jit
def _forward_kernel(
    v_ptr, alpha_ptr, v_hat_ptr, codes_ptr, counts_ptr, totals_ptr, row, per_row,
    PER_CHANNEL: tl.constexpr, QN: tl.constexpr, QP: tl.constexpr,
    IN_STEPS: tl.constexpr, DROP_CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, exists, channel = _place(row, per_row, PER_CHANNEL, BLOCK)
    v, alpha, u, c = _quantize(v_ptr, alpha_ptr, at, exists, channel, QN, QP)
    tl.store(v_hat_ptr + at, (c * alpha).to(v_hat_ptr.dtype.element_ty), mask=exists)
    if codes_ptr is not None:
        tl.store(codes_ptr + at, tl.where(c == c, c, QN * 1.0).to(codes_ptr.dtype.element_ty), mask=exists)
    if counts_ptr is not None:
        index = _bin(u, c, exists, QN, QP, DROP_CLIPPED)
        d = _distance(v, alpha, u, c, IN_STEPS)
        square = d * d
        first = tl.program_id(0).to(tl.int64) * (QP - QN + 1)
        # A compare, two selects and two adds per element and level, in registers, and two block sums per level: a
        # handful of levels, as in low-bit training, should hide behind the reading of v. At 256 the arithmetic rules,
        # by count some ten times the reading; atomics in shared memory would do less of it, but add floats in
        # another order every time. A loop, not unrolled: 256 bodies would compile for long.
        for i in range(QP - QN + 1):
            member = index == i
            tl.store(counts_ptr + first + i, tl.sum(member.to(tl.int32), 0))
            tl.store(totals_ptr + first + i, tl.sum(tl.where(member, square, 0.0), 0))


@triton.jit
def _backward_kernel(
    v_ptr, alpha_ptr, grad_ptr, lookup_ptr, grad_v_ptr, sums_ptr, sums_br_ptr, row, per_row,
    PER_CHANNEL: tl.constexpr, QN: tl.constexpr, QP: tl.constexpr,
    IN_STEPS: tl.constexpr, DROP_CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, exists, channel = _place(row, per_row, PER_CHANNEL, BLOCK)
    v, alpha, u, c = _quantize(v_ptr, alpha_ptr, at, exists, channel, QN, QP)
    grad_v = tl.zeros_like(v)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + at, mask=exists, other=0.0).to(tl.float32)
        inside = (u > QN) & (u < QP)
        grad_v = grad * inside.to(tl.float32)  # a product, so that a gradient that is not finite stays visible
        if sums_ptr is not None:
            slope = tl.where(inside, c - u, tl.where(c == c, c, QN * 1.0))
            tl.store(sums_ptr + tl.program_id(0), tl.sum(grad * slope, 0))
    if lookup_ptr is not None:
        index = _bin(u, c, exists, QN, QP, DROP_CLIPPED)
        weight = tl.load(lookup_ptr + index, mask=index >= 0, other=0.0)
        # Selected, not multiplied: what was dropped may be infinite.
        pull = tl.where(index >= 0, weight * _distance(v, alpha, u, c, IN_STEPS), 0.0)
        if sums_br_ptr is not None:
            along = tl.where(index >= 0, u if IN_STEPS else c, 0.0)
            tl.store(sums_br_ptr + tl.program_id(0), tl.sum(pull * along, 0))
        if IN_STEPS:
            pull = tl.div_rn(pull, alpha)
        grad_v += pull
    if grad_v_ptr is not None:
        tl.store(grad_v_ptr + at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=exists)
