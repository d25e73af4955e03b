"""The Triton kernels against the plain formulas, lsq and bin_table, forward and backward.

Without a GPU the kernels run in Triton's interpreter. Triton looks at TRITON_INTERPRET while it is imported, and
torch or another test may have imported it already: so this file is also a program, which a test starts with the
variable set. `TRITON_INTERPRET=1 python tests/test_triton.py` names the cases that fail.

What is held:
    v_hat, codes, count, dv     every element the same as the plain float32 formula, whatever the device: the kernels
                                round where it rounds. In 16 bits, that result rounded once.
    mse, dalpha                 sums in another order than the reference, which runs in float64. Each term and each
                                block's sum carries float32 roundings of 2^-24 of its operands: three or four in
                                a term, some 25 in a sum (16 in a row per thread, then a tree). They do not all
                                point one way; the bound allows 8.
"""

import itertools
import os
import random
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from brqat.bins import bin_index, bin_table
from brqat.grid import uniform_grid
from brqat.kernels import Bins
from brqat.quantizer.lsq import lsq as plain_lsq

triton = pytest.importorskip("triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCALE = 0.37
ROUNDINGS = 8 * 2.0**-24


class Case(NamedTuple):
    shape: tuple[int, ...]
    layout: str  # dense, last (channels_last), turned (dimensions 0 and -1 swapped), gaps (every other element)
    bits: int
    signed: bool
    per_channel: bool
    dtype: torch.dtype
    bins: Bins | None
    # same: alpha itself; own: another leaf of the same value; only: such a leaf while alpha is frozen; detached; frozen
    alpha_br: str
    grads: str  # both, v_hat, mse: which results the loss uses
    special: str  # none, nan, inf, edges (ties and ends, an alpha that is a power of two), ends (q * alpha, any alpha)
    codes: bool
    needs_v: bool


SHAPES = [(), (1,), (7,), (1023,), (1025,), (8200,), (5, 1), (1, 9), (3, 300), (2, 4099), (4, 6, 5, 5), (6, 3, 3, 3),
          (2, 5, 1, 1), (4, 1, 3, 3), (0,), (4, 0), (0, 3)]  # fmt: skip
GRIDS = [(1, False), (2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (8, True), (8, False)]
BINS = [None, *itertools.starmap(Bins, itertools.product((False, True), repeat=2))]


def cases(number: int) -> list[Case]:
    """Drawn at random, but every shape, grid and kind of bins in turn: their counts have no common divisor."""
    found = []
    for seed in range(number):
        draw = random.Random(seed)
        shape = SHAPES[seed % len(SHAPES)]
        bins = BINS[seed % len(BINS)]
        layouts = ["dense"] + (["turned", "gaps"] if len(shape) > 1 else []) + (["last"] * 2 if len(shape) == 4 else [])
        found.append(
            Case(
                shape,
                draw.choice(layouts),
                *GRIDS[seed % len(GRIDS)],
                per_channel=len(shape) > 1 and draw.random() < 0.5,
                dtype=draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
                bins=bins,
                alpha_br=draw.choice(["same", "same", "own", "own", "only", "detached", "frozen"]),
                grads="v_hat" if bins is None else draw.choice(["both", "both", "v_hat", "mse"]),
                special=draw.choice(["none", "nan", "inf", "edges", "ends"]),
                codes=draw.random() < 0.7,
                needs_v=draw.random() < 0.8,
            )
        )
    return found


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
    grid = uniform_grid(case.bits, case.signed)
    alpha_shape = (case.shape[0],) + (1,) * (len(case.shape) - 1) if case.per_channel else ()
    alpha = 0.05 + torch.rand(alpha_shape, generator=g)
    if case.special == "edges":
        alpha = torch.full(alpha_shape, 0.125)
    # A share of the values beyond both ends of the grid.
    spread = grid.num_levels / 2 + 1
    u = grid.qn + grid.num_levels / 2 + spread * torch.randn(case.shape, generator=g) / 1.5
    pick = torch.rand(case.shape, generator=g)
    if case.special == "edges":
        halves = torch.randint(2 * grid.qn - 2, 2 * grid.qp + 3, case.shape, generator=g) / 2
        u = torch.where(pick < 0.6, halves, u)
    v = u * alpha
    if case.special == "ends":
        v = torch.where(pick < 0.3, grid.qn * alpha, torch.where(pick < 0.6, grid.qp * alpha, v))
    v = v.to(case.dtype)
    if case.special == "nan":
        v[pick < 0.01] = float("nan")
    if case.special == "inf":
        v[pick < 0.05] = float("inf")
        v[pick > 0.95] = -float("inf")
    grad = torch.randn(case.shape, generator=g).to(case.dtype)
    return grid, v, alpha, grad, torch.randn(grid.num_levels, generator=g)


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
    v_hat, codes = plain_lsq(v, alpha, grid, SCALE)
    codes = torch.where(v.detach().isnan(), grid.qn, codes)
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
    got = got.double()
    alike = (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= bound)
    assert alike.all(), (what, (got - want).abs(), bound)


def bounds(v, alpha, codes, count, mse, grid, grad, grad_mse, case):
    """ROUNDINGS times the magnitudes that the sums of mse, dalpha and dalpha_br add up."""
    u, c, a = v / alpha, codes.double(), alpha
    grad_v_hat = grad.double().abs() if case.grads != "mse" else torch.zeros_like(v)
    far = float(max(-grid.qn, grid.qp)) * 2
    b_alpha = ROUNDINGS * SCALE * (grad_v_hat * far).sum_to_size(alpha.shape)
    if case.bins is None:
        return None, b_alpha, None
    # |d| times the operands of d, at most: root of the mean square times the largest operand.
    kept = u.isfinite() & ~((u < grid.qn) | (u > grid.qp) if case.bins.drop_clipped else torch.zeros_like(u).bool())
    operand = u.abs() + c.abs() if case.bins.in_steps else v.abs() + c.abs() * a
    peak = operand[kept].max() if kept.any() else 0.0
    b_mse = ROUNDINGS * (mse + mse.sqrt() * peak)
    weight = (2 * grad_mse / count.clamp(min=1)).double().abs()[bin_index(codes, grid)]
    if case.grads == "v_hat":
        weight = weight * 0
    along = u.abs() / a if case.bins.in_steps else c.abs()
    b_br = ROUNDINGS * torch.where(kept, weight * operand * along, 0.0).sum_to_size(alpha.shape)
    return b_mse, b_alpha, b_br


def check(case: Case, seed: int, device: str, fused) -> None:
    grid, v, alpha, grad, grad_mse = (t.to(device) if isinstance(t, torch.Tensor) else t for t in inputs(case, seed))
    # What the plain formulas make of a NaN's code depends on the processor: its gradient is a test of its own.
    grad = torch.where(v.isnan(), 0, grad)
    v = laid_out(v, case.layout)

    leaf, alpha_leaf, own, alpha_br = leaves(v, alpha, case)
    v_hat, codes, count, mse = fused(leaf, alpha_leaf, alpha_br, grid, SCALE, case.codes, case.bins)
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
        assert codes.dtype == torch.int16 and not codes.requires_grad and codes.stride() == v_hat.stride()
        same(codes, want_codes, "codes")
    assert (count is None) == (mse is None) == (case.bins is None)
    args = exact_v, alpha.double(), want_codes, count, exact_mse, grid, grad, grad_mse, case
    b_mse, b_alpha, b_br = (None if b is None else b.detach() for b in bounds(*args))
    if case.bins:
        assert count.dtype == torch.int64
        same(count, want_count, "count")
        close(mse.detach(), exact_mse.detach(), b_mse, "mse")

    assert (got[0] is None) == (want[0] is None), "dv"
    if got[0] is not None:
        assert got[0].dtype == v.dtype
        same_rounded(got[0], want[0], "dv")
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


def check_compiled(device: str, fused, backend: str) -> None:
    """One graph, and the results of the same call outside of it to the last bit."""
    grid = uniform_grid(2, True)

    def loss(v, alpha, alpha_br, bins):
        v_hat, codes, count, mse = fused(v * 1.0, alpha, alpha_br, grid, SCALE, True, bins)
        total = v_hat.float().square().sum()
        return (total if mse is None else total + mse.sum()), codes, count

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    w = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    for v, shape, bins, detached in (
        (w, (), Bins(False, False), False),
        (w.to(memory_format=torch.channels_last), (4, 1, 1, 1), Bins(True, True), True),
        (w.bfloat16(), (), None, True),
    ):
        results = []
        for call in (loss, compiled):
            x, alpha = v.clone().requires_grad_(), torch.full(shape, 0.3, device=device, requires_grad=True)
            total, codes, count = call(x, alpha, alpha.detach() if detached else alpha, bins)
            total.backward()
            results.append([codes, x.grad, alpha.grad] + ([] if count is None else [count]))
        for one, other in zip(*results, strict=True):
            assert one.stride() == other.stride()
            same(one, other, "compiled")


def run_all(device: str, number: int) -> list[str]:
    """What went wrong, one text per case."""
    from brqat.kernels.triton import lsq as fused

    todo = [(case, lambda c=case, s=seed: check(c, s, device, fused)) for seed, case in enumerate(cases(number))]
    todo.append(("nan", lambda: check_nan(device, fused)))
    todo.append(("repeats", lambda: check_repeats(device, fused)))
    todo.append(("expanded gradient", lambda: check_expanded_gradient(device, fused)))
    if device == "cpu":  # Inductor has a test of its own, on a GPU
        todo.append(("compiled", lambda: check_compiled(device, fused, "aot_eager")))
    wrong = []
    for name, call in todo:
        try:
            call()
        except Exception:
            wrong.append(f"{name}\n{traceback.format_exc(limit=-3)}")
    return wrong


def test_interpreted_kernels_equal_the_plain_formulas():
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu_and_round_as_written(dtype):
    """The interpreter accepts what the compiler would not. No division but the exact one, and nothing fused."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from brqat.kernels import triton as kernels

    v, f, constant = f"*{dtype}", "*fp32", "constexpr"
    settings = {"PER_CHANNEL": True, "QN": -2, "QP": 1, "IN_STEPS": True, "DROP_CLIPPED": True, "BLOCK": 256}
    forward = {"v_ptr": v, "alpha_ptr": f, "v_hat_ptr": v, "codes_ptr": "*i16", "counts_ptr": "*i32", "totals_ptr": f}
    backward = {"v_ptr": v, "alpha_ptr": f, "grad_ptr": v, "lookup_ptr": f, "grad_v_ptr": v, "sums_ptr": f}
    backward["sums_br_ptr"] = f
    for kernel, pointers in ((kernels._forward_kernel, forward), (kernels._backward_kernel, backward)):
        signature = pointers | {"row": "i32", "per_row": "i32"} | dict.fromkeys(settings, constant)
        source = ASTSource(fn=kernel, signature=signature, constexprs=settings)
        options = {"num_warps": 2, "enable_fp_fusion": False}
        ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
        assert set(re.findall(r"\bdiv\.\S+f32", ptx)) == {"div.rn.f32"}
        assert not re.search(r"\bfma\.", ptx)


@pytest.mark.gpu
@needs_cuda
def test_kernels_on_cuda_equal_the_plain_formulas():
    wrong = run_all("cuda", 150)
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@needs_cuda
def test_compiled_on_cuda_is_one_graph_with_the_same_results():
    from brqat.kernels.triton import lsq as fused

    check_compiled("cuda", fused, "inductor")


if __name__ == "__main__":
    failed = run_all("cpu", 56)
    print(*failed, sep="\n")
    sys.exit(bool(failed))
