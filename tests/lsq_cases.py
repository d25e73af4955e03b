"""One call of a kernel for lsq with its bin table, at random, and what is held of it against the plain formulas.

v_hat, codes, count     every element the same as the plain float32 formula: a kernel rounds where it rounds. In 16
                        bits, that result rounded once.
mse, dalpha             sums in another order than the reference, which runs in float64: within so many roundings,
                        2^-24 each, of the magnitudes that they add up
dv                      the same to the last bit, or within so many roundings
dyadic                  few bits everywhere, so that nothing is rounded in any order: all of it the same
"""

import itertools
import os
import random
from typing import NamedTuple

import torch

from brqat.bins import bin_index, bin_table
from brqat.grid import SIGN_GRID, Grid, uniform_grid
from brqat.kernels import Bins
from brqat.quantizer.lsq import lsq as plain_lsq
from brqat.quantizer.sign import _Sign

SCALE = 0.375
ROUNDING = 2.0**-24
ROUNDING_BF16 = 2.0**-8


class Case(NamedTuple):
    shape: tuple[int, ...]
    layout: str  # dense, last (channels_last), turned (dimensions 0 and -1 swapped), gaps (every other element)
    bits: int  # 1, signed: the quantizer is sign
    signed: bool
    per_channel: bool
    dtype: torch.dtype
    bins: Bins | None
    # same: alpha itself; own: another leaf of the same value; only: such a leaf while alpha is frozen; detached; frozen
    alpha_br: str
    grads: str  # both, v_hat, mse: which results the loss uses
    # none, nan, inf, edges (ties and ends, an alpha that is a power of two), ends (q * alpha, any alpha),
    # near (a few ulp from ties and ends, any alpha), small (near the least floats), huge (overflow, for v_hat alone),
    # scales (alphas from 1e-8 to 1e8), dyadic
    special: str
    codes: bool
    needs_v: bool
    grad_layout: str = "dense"  # that, as in layout, or expanded


GRIDS = [(1, False), (2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (8, True), (8, False)]
BINS = [None, *itertools.starmap(Bins, itertools.product((False, True), repeat=2))]


def cases(number: int, shapes, grids, dtypes, specials, grad_layouts=("dense",)) -> list[Case]:
    """Drawn at random, but every shape, grid and kind of bins in turn, where their counts have no common divisor."""
    found = []
    for seed in range(number):
        draw = random.Random(seed)
        shape = shapes[seed % len(shapes)]
        layouts = ["dense"] + (["turned", "gaps"] if len(shape) > 1 else []) + (["last"] * 2 if len(shape) == 4 else [])
        special = draw.choice(specials)
        bins = BINS[seed % len(BINS)] if special != "huge" else None
        found.append(
            Case(
                shape,
                draw.choice(layouts),
                *grids[seed % len(grids)],
                per_channel=len(shape) > 1 and draw.random() < 0.5,
                dtype=draw.choice(dtypes),
                bins=bins,
                alpha_br=draw.choice(["same", "same", "own", "own", "only", "detached", "frozen"]),
                grads="v_hat" if bins is None else draw.choice(["both", "both", "v_hat", "mse"]),
                special=special,
                codes=draw.random() < 0.7,
                needs_v=draw.random() < 0.8,
                grad_layout=draw.choice(list(grad_layouts) + layouts) if len(grad_layouts) > 1 else grad_layouts[0],
            )
        )
    return found


def grid_of(case: Case) -> Grid:
    return SIGN_GRID if case.bits == 1 and case.signed else uniform_grid(case.bits, case.signed)


def laid_out(v: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, in memory in another order."""
    if layout == "last":
        return v.contiguous(memory_format=torch.channels_last)
    if layout == "turned":
        return v.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        return v.new_zeros(*v.shape[:-1], 2 * v.shape[-1])[..., ::2].copy_(v)
    return v


def inputs(case: Case, seed: int):
    """v, alpha and the gradients of v_hat and mse, on the CPU, v in the case's dtype."""
    g = torch.Generator().manual_seed(seed)
    grid = grid_of(case)
    alpha_shape = (case.shape[0],) + (1,) * (len(case.shape) - 1) if case.per_channel else ()
    alpha = 0.05 + torch.rand(alpha_shape, generator=g)
    if case.special == "edges":
        alpha = torch.full(alpha_shape, 0.125)
    if case.special == "scales":
        alpha = 10 ** (16 * torch.rand(alpha_shape, generator=g) - 8)
    if case.special == "dyadic":
        alpha = 2.0 ** torch.randint(-4, 1, alpha_shape, generator=g)
    # A share of the values beyond both ends of the grid.
    spread = grid.num_levels / 2 + 1
    u = grid.qn + grid.num_levels / 2 + spread * torch.randn(case.shape, generator=g) / 1.5
    pick = torch.rand(case.shape, generator=g)
    if case.special == "edges":
        halves = torch.randint(2 * grid.qn - 2, 2 * grid.qp + 3, case.shape, generator=g) / 2
        u = torch.where(pick < 0.6, halves, u)
    if case.special == "dyadic":
        u = torch.randint(8 * grid.qn - 16, 8 * grid.qp + 17, case.shape, generator=g) / 8
    v = u * alpha
    if case.special == "ends":
        v = torch.where(pick < 0.3, grid.qn * alpha, torch.where(pick < 0.6, grid.qp * alpha, v))
    if case.special == "near":
        halves = torch.randint(2 * grid.qn - 1, 2 * grid.qp + 2, case.shape, generator=g) / 2
        v = halves * alpha * (1 + torch.randint(-3, 4, case.shape, generator=g) * 2.0**-24)
    if case.special == "small":
        v = torch.where(pick < 0.5, v * 1e-39, torch.where(pick < 0.6, -0.0, torch.where(pick < 0.7, v * 1e-44, v)))
    if case.special == "huge":
        v = torch.where(pick < 0.2, 3.3e38, torch.where(pick > 0.8, -3.3e38, torch.where(pick < 0.4, v * 1e30, v)))
    v = v.to(case.dtype)
    if case.special == "nan":
        v[pick < 0.01] = float("nan")
    if case.special == "inf":
        v[pick < 0.05] = float("inf")
        v[pick > 0.95] = -float("inf")
    grad = torch.randn(case.shape, generator=g).to(case.dtype)
    grad_mse = torch.randn(grid.num_levels, generator=g)
    if case.special == "dyadic":
        grad = torch.randint(-4, 5, case.shape, generator=g).to(case.dtype) / 2
        grad_mse = torch.randint(-2, 3, grad_mse.shape, generator=g).float()  # of a bin's pull on an element, to come
    if case.grad_layout == "expanded":
        grad = grad.flatten()[:1].view([1] * grad.dim()).expand(grad.shape) if grad.numel() else grad
    else:
        grad = laid_out(grad, case.grad_layout)
    return grid, v, alpha, grad, grad_mse


def leaves(v, alpha, case):
    v = v.detach().requires_grad_(case.needs_v)
    alpha = alpha.detach().clone().requires_grad_(case.alpha_br not in ("only", "frozen"))
    own = alpha.detach().clone().requires_grad_()
    return (
        v,
        alpha,
        own,
        own if case.alpha_br in ("own", "only") else alpha if case.alpha_br == "same" else alpha.detach(),
    )


def gradients(v_hat, mse, v, alpha, own, grad, grad_mse, case):
    """Of v, alpha and alpha_br's own leaf, None where there is none."""
    wanted = [(v_hat, grad.to(v_hat.dtype))] if case.grads != "mse" else []
    if case.grads != "v_hat":
        wanted.append((mse, grad_mse.to(mse.dtype)))
    wanted = [(result, upstream) for result, upstream in wanted if result.requires_grad]
    if not wanted:
        return [None] * 3
    results, upstream = zip(*wanted, strict=True)
    asked = [leaf for leaf in (v, alpha, own) if leaf.requires_grad]
    found = iter(torch.autograd.grad(results, asked, upstream, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in (v, alpha, own)]


def plain(v, alpha, grid, grad, grad_mse, case):
    """The same by lsq and bin_table, in v's precision."""
    v, alpha, own, alpha_br = leaves(v, alpha, case)
    v_hat, codes = _Sign.apply(v, alpha, SCALE) if grid.gap == 2 else plain_lsq(v, alpha, grid, SCALE)
    count = mse = None
    if case.bins:
        shown, unit = (v / alpha_br, torch.ones_like(alpha_br)) if case.bins.in_steps else (v, alpha_br)
        count, mse = bin_table(shown, codes, unit, grid, case.bins.drop_clipped)
    return v_hat.detach(), codes, count, mse, gradients(v_hat, mse, v, alpha, own, grad, grad_mse, case)


def same(got, want, what):
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert torch.equal(got.isnan(), want.isnan()), what
    assert torch.equal(got.nan_to_num(0, 1e38, -1e38), want.nan_to_num(0, 1e38, -1e38)), (what, got, want)


def same_rounded(got, want, what):
    """got is want, a float32, rounded to got's dtype. Triton's interpreter cuts a bfloat16 off instead of rounding."""
    rounded = want.to(got.dtype)
    if got.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        cut = (want.view(torch.int32) & ~0xFFFF).view(torch.float32).to(got.dtype)
        rounded = torch.where(got == cut, cut, rounded)
    same(got, rounded, what)


def close(got, want, bound, what):
    """Within the bound, or the same infinity, or both not a number."""
    assert got.shape == want.shape and got.dtype == torch.float32, (what, got.shape, want.shape, got.dtype)
    # Rounded once more, at most: what is beyond the largest float is infinite there.
    got, want, bound = got.double(), want.float().double(), bound + ROUNDING * want.abs()
    alike = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= bound)
    assert alike.all(), (what, (got - want).abs(), bound)


def bounds(v, alpha, codes, count, mse, grid, grad, grad_mse, case, roundings):
    """Of mse, dalpha, dalpha_br and dv: roundings of the magnitudes that they add up."""
    u, c, a = v / alpha, codes.double(), alpha
    unit = roundings * ROUNDING if case.special != "dyadic" else 0.0
    grad_v_hat = grad.double().abs() if case.grads != "mse" else torch.zeros_like(v)
    far = float(max(-grid.qn, grid.qp)) * 2
    b_alpha = unit * SCALE * (grad_v_hat * far).sum_to_size(alpha.shape)
    if case.bins is None:
        return None, b_alpha, None, torch.zeros_like(v)
    # |d| times the operands of d, at most: root of the mean square times the largest operand.
    kept = u.isfinite() & ~((u < grid.qn) | (u > grid.qp) if case.bins.drop_clipped else torch.zeros_like(u).bool())
    operand = u.abs() + c.abs() if case.bins.in_steps else v.abs() + c.abs() * a
    peak = operand[kept].max() if kept.any() else 0.0
    least = 1e-37 if unit else 0.0  # the squares of small values are 0 in 32 bits
    b_mse = unit * (mse + mse.sqrt() * peak + unit * peak**2) + least
    weight = (2 * grad_mse / count.clamp(min=1)).double().abs()[bin_index(codes, grid)]
    if case.grads == "v_hat":
        weight = weight * 0
    pull = torch.where(kept, weight * operand, 0.0)
    along = u.abs() / a if case.bins.in_steps else c.abs()
    b_br = unit * torch.where(kept, pull * along, 0.0).sum_to_size(alpha.shape)
    # Where nothing pulls, the gradient from above is handed on as it is.
    b_v = unit * (torch.where(pull > 0, grad_v_hat, 0.0) + (pull / a if case.bins.in_steps else pull))
    b_v = torch.where(pull > 0, b_v + least, 0.0)
    return b_mse, b_alpha, b_br, b_v


def check(case: Case, seed: int, device: str, fused, roundings: int, dv_is_same: bool) -> None:
    """fused: called as kernels.lsq. dv_is_same: to the last bit, as the plain formula has it."""
    grid, v, alpha, grad, grad_mse = (t.to(device) if isinstance(t, torch.Tensor) else t for t in inputs(case, seed))
    v = laid_out(v, case.layout)

    leaf, alpha_leaf, own, alpha_br = leaves(v, alpha, case)
    v_hat, codes, count, mse = fused(leaf, alpha_leaf, alpha_br, grid, SCALE, case.codes, case.bins)
    if case.special == "dyadic" and count is not None:
        grad_mse = grad_mse * count / 2
    got = gradients(v_hat, mse, leaf, alpha_leaf, own, grad, grad_mse, case)

    plain_v = v.float()
    if case.bins and case.bins.drop_clipped:
        # The plain table multiplies what it drops by zero, and an infinity by zero is NaN.
        plain_v = plain_v.nan_to_num(float("nan"), 1e4, -1e4)
    want_v_hat, want_codes, want_count, _, want = plain(plain_v, alpha, grid, grad, grad_mse, case)
    # The value whose exact quotient is the float32 one: the 64-bit reference then decides every tie and end alike.
    exact_v = (plain_v / alpha).double() * alpha.double()
    *_, exact_mse, exact = plain(exact_v, alpha.double(), grid, grad.double(), grad_mse.double(), case)

    assert v_hat.dtype == v.dtype
    same_rounded(v_hat.detach(), want_v_hat, "v_hat")
    if case.layout != "gaps" and not case.per_channel:
        assert v_hat.stride() == v.stride()
    assert (codes is None) == (not case.codes)
    if case.codes:
        assert codes.dtype == grid.dtype and not codes.requires_grad and codes.stride() == v_hat.stride()
        same(codes, want_codes, "codes")
    assert (count is None) == (mse is None) == (case.bins is None)
    args = exact_v, alpha.double(), want_codes, count, exact_mse, grid, grad, grad_mse, case, roundings
    b_mse, b_alpha, b_br, b_v = (None if b is None else b.detach() for b in bounds(*args))
    if case.bins:
        assert count.dtype == torch.int64
        same(count, want_count, "count")
        close(mse.detach(), exact_mse.detach(), b_mse, "mse")

    assert (got[0] is None) == (want[0] is None), "dv"
    if got[0] is not None:
        assert got[0].dtype == v.dtype
        if dv_is_same:
            same_rounded(got[0], want[0], "dv")
        elif case.special == "dyadic":
            same(got[0], exact[0].to(v.dtype), "dv")
        else:
            rounding = 0 if v.dtype == torch.float32 else ROUNDING_BF16 * exact[0].abs()
            close(got[0].float(), exact[0], torch.where(b_v > 0, b_v + rounding, 0.0), "dv")
    b_alpha = b_alpha + b_br if case.alpha_br == "same" and case.bins else b_alpha
    for name, g, w, bound in (("dalpha", got[1], exact[1], b_alpha), ("dalpha_br", got[2], exact[2], b_br)):
        if g is None:  # autograd answers None or zeros where nothing leads to a leaf
            assert w is None or not w.any(), name
        else:
            close(g, torch.zeros_like(g).double() if w is None else w, bound, name)


def check_nan(device: str, fused) -> None:
    """Its gradient counts with the code that is stored for it, and as clipped."""
    alpha = torch.tensor(0.5, requires_grad=True, device=device)
    v = torch.tensor([float("nan"), 0.3], requires_grad=True, device=device)
    v_hat, codes, _, _ = fused(v, alpha, alpha, uniform_grid(2, True), 1.0, True, None)
    assert codes.tolist() == [-2, 1] and v_hat.isnan().tolist() == [True, False]
    v_hat.backward(torch.tensor([3.0, 0.0], device=device))
    assert v.grad.tolist() == [0, 0] and alpha.grad.item() == -6


def check_repeats(device: str, fused) -> None:
    """The same call gives the same bits."""
    v = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).to(device)
    alpha = torch.tensor(0.4, device=device)
    one, two = (fused(v, alpha, alpha, uniform_grid(2, True), 1.0, False, Bins(False, False))[3] for _ in range(2))
    same(one, two, "mse")


def check_expanded_gradient(device: str, fused) -> None:
    """sum() hands back a gradient that lies nowhere in memory."""
    alpha = torch.tensor(0.5, requires_grad=True, device=device)
    v = torch.randn(3, 5, device=device).requires_grad_()
    fused(v, alpha, alpha, uniform_grid(8, True), 1.0, False, None)[0].sum().backward()
    assert v.grad.tolist() == torch.ones(3, 5).tolist()
    grads = []
    for weights in (None, torch.ones(4, device=device)):
        v.grad = alpha.grad = None
        mse = fused(v, alpha, alpha, uniform_grid(2, True), 1.0, False, Bins())[3]
        (mse.sum() if weights is None else (mse * weights).sum()).backward()
        grads.append((v.grad, alpha.grad))
    assert all(map(torch.equal, *grads)) and all(grad.abs().sum() > 0 for grad in grads[0])
