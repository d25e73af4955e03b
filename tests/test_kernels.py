"""The C++ kernels against the plain formulas, and how they are built.

A library can be loaded once per process, so this file is also a program: `python tests/test_kernels.py SOURCES FOLDER`
builds what lies in SOURCES and names the cases of `run_all` that fail. A test starts it on sources with a fault.

What is held of lsq stands in lsq_cases.py. The number of roundings: three or four in a term, and up to 128 additions in
a row in float (BLOCK over the lanes of AVX2; 64 with AVX512), whose roundings of 2^-24 of the sum so far go either way:
about sqrt(128) of them. The bound allows 16.
"""

import itertools
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lsq_cases import GRIDS, ROUNDING, SCALE, cases, check, check_expanded_gradient, check_nan, check_repeats
from torch import nn
from torch.utils import cpp_extension
from torch.utils.checkpoint import checkpoint

from brqat import kernels
from brqat.bins import BinTable, bin_index, site_table
from brqat.fusion import DeferredNorm
from brqat.grid import SIGN_GRID, uniform_grid
from brqat.kernels import Bins, Norm
from brqat.kernels import native as builder
from brqat.layers import Before, QuantConv2d
from brqat.quantizer.lsq import LSQ, lsq

CPU = torch.device("cpu")
ROUNDINGS = 16
LARGE = [(32768,), (32769,), (70_001,), (3, 33_333), (8, 40, 17, 9), (2, 33_000, 1, 1)]
SHAPES = [(), (1,), (7,), (16,), (1023,), (1025,), (8200,), (5, 1), (1, 9), (3, 300), (2, 4099), (2, 3, 37), (1, 1, 1),
          (4, 6, 5, 5), (6, 3, 3, 3), (2, 5, 1, 1), (4, 1, 3, 3), (3, 17, 4, 4), (0,), (4, 0), (0, 3), (2, 0, 3, 3),
          (1, 3, 2, 7)]  # fmt: skip
ALL_GRIDS = [*GRIDS, (1, True), (5, True), (5, False), (6, True), (6, False), (7, True), (7, False)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16]
SPECIALS = ["none", "nan", "inf", "edges", "ends", "near", "small", "huge", "scales", "dyadic", "dyadic"]
LAYOUTS = ["dense", "expanded"]


BOUNDS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (0.0, 1.0)]  # nothing, ReLU, ReLU6, ClippedReLU
EVERY_BINS = list(itertools.starmap(Bins, itertools.product((False, True), repeat=2)))


def last(rows: torch.Tensor) -> torch.Tensor:
    """(M, C) as (N, C, H, W) in channels_last memory, M a multiple of 8."""
    return rows.view(-1, 4, 2, rows.shape[1]).permute(0, 3, 1, 2)


def flat(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.permute(0, 2, 3, 1).reshape(-1, pictures.shape[1])


def fused(x, weight, bias, alpha, alpha_br, eps, low, high, grid, bins, shortcut=None):
    channels = weight.numel()
    norm = Norm(weight, bias, torch.zeros(channels), torch.ones(channels), 0.1, True, eps, low, high)
    out, r = kernels.norm_lsq(x, shortcut, norm, alpha, alpha_br, grid, SCALE, bins)
    return out if shortcut is None else (*out, r)


def activated(y, low, high):
    if low == -math.inf:
        return y
    return nn.functional.relu(y) if high == math.inf else nn.functional.hardtanh(y, low, high)


def unfused(x, weight, bias, alpha, alpha_br, eps, low, high, grid, bins, shortcut=None):
    """Step by step, in the precision of what comes. Also y."""
    y = nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    if shortcut is not None:
        y = y + shortcut
    r = activated(y, low, high)
    v_hat, codes = lsq(r, alpha, grid, SCALE)
    return v_hat, codes, site_table(r, codes, alpha_br, grid, bins) if bins else BinTable(None, None), y, r


def norm_gradients(outputs, mse, leaves, grad_mse):
    results = outputs + ([] if mse is None else [(mse, grad_mse)])
    results, upstream = zip(*((out, grad.to(out.dtype)) for out, grad in results), strict=True)
    return torch.autograd.grad(results, leaves, upstream, allow_unused=True)


def check_expanded_gradient_of_norm() -> None:
    """As check_expanded_gradient in lsq_cases.py."""
    g = torch.Generator().manual_seed(0)
    x, ones, zeros = last(torch.randn(64, 5, generator=g)), torch.ones(5), torch.zeros(5)
    grads = []
    for weights in (None, torch.ones(4)):
        leaves = [t.clone().requires_grad_() for t in (x, ones, zeros, torch.tensor(0.5))]
        out = fused(*leaves, leaves[-1], 1e-5, 0.0, math.inf, uniform_grid(2, False), Bins())
        (out.mse.sum() if weights is None else (out.mse * weights).sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads)) and all(grad.abs().sum() > 0 for grad in grads[0])


def check_norm_exactly(channels, low, high, bins, joined, repeats=4):
    """Values of few bits, a mean of 0 and a standard deviation of 2 after eps: only dx is rounded, two or three times.

    Ties, both ends of the grid and both bounds of the activation are hit. joined: with a shortcut, whose sum others
    read too.
    """
    g = torch.Generator().manual_seed(channels)
    half = torch.randint(-16, 17, (64,), generator=g) / 8
    block = torch.cat([half, -half])
    rows = torch.stack([block[torch.randperm(128, generator=g)] for _ in range(channels)], dim=1)
    x = last(rows.repeat(repeats, 1))
    eps = 4 - half.square().mean().item()
    weight = torch.tensor([0.5, 1.0, -1.0, 2.0, 4.0])[torch.randint(5, (channels,), generator=g)]
    bias = torch.randint(-4, 9, (channels,), generator=g) / 4
    grid = uniform_grid(3, signed=low < 0)
    grad = torch.randint(-4, 5, x.shape, generator=g).float() / 2
    pulls = torch.randint(-2, 3, (grid.num_levels,), generator=g).float()
    shortcut = [torch.randint(-8, 9, x.shape, generator=g) / 8] if joined else []
    grad_r = torch.randint(-4, 5, x.shape, generator=g).float() / 2

    found = []
    for call, dtype in ((fused, torch.float32), (unfused, torch.float64)):
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, weight, bias, *shortcut)]
        alphas = [torch.tensor(0.25, dtype=dtype, requires_grad=True) for _ in range(2)]
        v_hat, _, *rest = call(*leaves[:3], *alphas, eps, low, high, grid, bins, *leaves[3:])
        count, mse = rest[:2] if call is fused else rest[0]
        grad_mse = None if count is None else pulls * count / 2
        outputs = [(v_hat, grad)] + ([(rest[-1], grad_r)] if joined else [])
        found.append((v_hat, count, mse, norm_gradients(outputs, mse, leaves + alphas, grad_mse)))
        if joined and call is fused:
            assert rest[-1].stride() == x.stride()
    (v_hat, count, mse, got), (want_v_hat, want_count, want_mse, want) = found
    assert v_hat.stride() == x.stride()
    assert torch.equal(v_hat, want_v_hat.float())
    if bins:
        assert torch.equal(count, want_count) and torch.equal(mse, want_mse.float())
    names = ("dweight", "dbias", *(["dshortcut"] if joined else []), "dalpha", "dalpha_br")
    for name, one, other in zip(names, got[1:], want[1:], strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other.float())), name
    assert ((got[0] - want[0]).abs() <= 2**-22 * (1 + want[0].abs().max())).all(), "dx"


def run_all(small: int, large: int) -> list[str]:
    """What went wrong, one text per case."""
    drawn = cases(small, SHAPES, ALL_GRIDS, DTYPES, SPECIALS, LAYOUTS)
    drawn += cases(large, LARGE, ALL_GRIDS[::-1][1:], DTYPES, SPECIALS, LAYOUTS)
    todo = [
        (case, lambda c=case, s=seed: check(c, s, "cpu", kernels.lsq, ROUNDINGS, False))
        for seed, case in enumerate(drawn)
    ]
    todo.append(("nan", lambda: check_nan("cpu", kernels.lsq)))
    todo.append(("repeats", lambda: check_repeats("cpu", kernels.lsq)))
    todo.append(("expanded gradient", lambda: check_expanded_gradient("cpu", kernels.lsq)))
    todo.append(("expanded gradient of norm_lsq", check_expanded_gradient_of_norm))
    every = itertools.product((1, 3, 16, 24, 40, 64, 100), BOUNDS, (None, *EVERY_BINS), (False, True))
    for channels, (low, high), bins, joined in every:
        case = f"norm_lsq of {channels} channels, exact, {low}..{high}, {bins}, {'joined' if joined else 'alone'}"
        todo.append((case, lambda args=(channels, low, high, bins, joined): check_norm_exactly(*args)))
    wrong = []
    for name, call in todo:
        try:
            call()
        except Exception:
            wrong.append(f"{name}\n{traceback.format_exc(limit=-3)}")
    return wrong


def test_lsq_equals_the_plain_formulas(native):
    wrong = run_all(2000, 200)
    assert not wrong, f"{len(wrong)} cases\n" + "\n".join(wrong[:5])


def test_the_reference_does_other_dtypes(native):
    alpha = torch.tensor(0.5)
    for dtype in (torch.float64, torch.float16):
        assert kernels.lsq(torch.zeros(3, dtype=dtype), alpha, alpha, uniform_grid(2, True), 1.0, True, None) is None


def bits_of(tensors):
    return [t.flatten().view(torch.uint8) for t in tensors]


def on_threads(number, call):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return bits_of(call())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape, rows", [((300_001,), False), ((8, 64, 24, 24), False), ((48, 9000), True)])
@pytest.mark.parametrize("grid", [SIGN_GRID, uniform_grid(2, True), uniform_grid(8, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit_of_lsq(native, shape, rows, grid, dtype):
    g = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    alpha = torch.full((shape[0], 1) if rows else (), 0.3, requires_grad=True)
    alpha_br = alpha.detach().clone().requires_grad_()
    grad, grad_mse = torch.randn(shape, generator=g).to(dtype), torch.randn(grid.num_levels, generator=g)

    def call():
        out = kernels.lsq(v, alpha, alpha_br, grid, SCALE, True, Bins(False, False))
        return *out, *torch.autograd.grad((out.v_hat, out.mse), (v, alpha, alpha_br), (grad, grad_mse))

    assert all(map(torch.equal, on_threads(1, call), on_threads(2, call)))


@pytest.mark.parametrize("channels", [3, 16, 40, 100])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_number_of_threads_changes_no_bit_of_norm_lsq(native, channels, bits):
    g = torch.Generator().manual_seed(0)
    grid = uniform_grid(bits, False)
    x = last(torch.randn(8 * 2500, channels, generator=g) + 1).requires_grad_()
    leaves = [torch.rand(channels, generator=g).requires_grad_() for _ in range(2)]
    alphas = [torch.tensor(0.3, requires_grad=True) for _ in range(2)]
    grad, grad_mse = torch.randn(x.shape, generator=g), torch.randn(grid.num_levels, generator=g)

    def call():
        norm = Norm(*leaves, torch.zeros(channels), torch.ones(channels), 0.1, True, 1e-5, 0.0, math.inf)
        out, _ = kernels.norm_lsq(x, None, norm, *alphas, grid, SCALE, Bins(False, False))
        grads = torch.autograd.grad((out.v_hat, out.mse), (x, *leaves, *alphas), (grad, grad_mse))
        return out.v_hat, out.count, out.mse, norm.running_mean, norm.running_var, *grads

    assert all(map(torch.equal, on_threads(1, call), on_threads(2, call)))


STRETCH = 128  # rows whose sums are in float
STRETCHES = 768  # vectors whose sums for alpha are


def rounding_of_sum(numbers, in_float):
    """Of that many numbers as a share of their magnitudes': roundings of either sign, and those of the numbers."""
    return (16 + math.sqrt(min(numbers, in_float))) * ROUNDING


def rounding_of_var(rows, mean, std):
    """Relative. Sums of floats in runs, and the means of pieces: each is a float, and so off by as much as the batch's
    mean, in standard deviations. Between pieces that meets how far their means lie apart."""
    off = 2 * ROUNDING * mean.abs() / std
    return rounding_of_sum(rows, STRETCH) + off**2 + 4 * off / math.sqrt(min(rows, 32768 / len(mean)))


def rounding_of_y(x, weight, bias, mean, std):
    """How far the kernel's y = x * scale + shift may lie from the exact one. All in float64, x as rows (M, C).

    Its scale carries roundings of its own and half that of var; shift and y one of each of their operands.
    """
    scale = weight.abs() / std
    relative = 4 * ROUNDING + rounding_of_var(len(x), mean, std)
    return relative * (x - mean).abs() * scale + 4 * ROUNDING * ((x.abs() + mean.abs()) * scale + bias.abs())


def near_an_edge(y, error, alpha, low, high, grid):
    """Where an error of y may change a code, or on which side of an end of the grid or of a bound it lies."""
    error = error + 2 * ROUNDING * y.abs()
    u = y.clamp(low, high) / alpha
    tie = ((u - u.floor() - 0.5).abs() * alpha <= error) & (u > grid.qn - 1) & (u < grid.qp + 1)
    edges = [edge for edge in (low, high, grid.qn * alpha, grid.qp * alpha) if math.isfinite(edge)]
    return tie, torch.stack([(y - edge).abs() <= error for edge in edges]).any(0)


class Drawn(NamedTuple):
    """Inputs, and the same calculation in float64."""

    inputs: tuple  # x, weight, bias
    alpha: torch.Tensor
    leaves: list  # in float64: inputs, alpha, alpha_br
    v_hat: torch.Tensor
    codes: torch.Tensor
    table: BinTable
    error: torch.Tensor  # what the kernel's y may be off, (M, C)
    tie: torch.Tensor  # where that may change a code, (M, C)
    edge: torch.Tensor  # where it may change a gradient from above into none


def drawn(seed, rows, channels, mean, std, low, high, grid, bins, eps=1e-5) -> Drawn:
    g = torch.Generator().manual_seed(1000 * channels + seed)
    x = last(torch.randn(rows, channels, generator=g) * std + mean)
    inputs = x, 0.5 + torch.rand(channels, generator=g), torch.randn(channels, generator=g) / 2
    alpha = torch.tensor(2.5 / grid.num_levels)
    leaves = [t.double().requires_grad_() for t in (*inputs, alpha, alpha)]
    v_hat, codes, table, y, _ = unfused(*leaves, eps, low, high, grid, bins)
    x64, weight, bias = flat(leaves[0].detach()), *(t.detach() for t in leaves[1:3])
    error = rounding_of_y(x64, weight, bias, x64.mean(0), (x64.var(0, unbiased=False) + eps).sqrt())
    tie, edge = near_an_edge(flat(y.detach()), error, alpha.item(), low, high, grid)
    return Drawn(inputs, alpha, leaves, v_hat, codes, table, error, tie, edge)


def drawn_for_bins(*args) -> Drawn:
    """With no value near an edge: one more or one less in a bin changes the pull on all of it."""
    for seed in range(100):
        d = drawn(seed, *args)
        if not (d.tie | d.edge).any():
            return d
    raise AssertionError("every draw has a value near an edge")


def test_long_sums_behind_a_norm_do_not_gather_roundings(native):
    """Equal terms: in one float their sum is off by 4335 roundings."""
    rows = 32768
    x = last(torch.randn(rows, 1, generator=torch.Generator().manual_seed(0)))
    bias = torch.zeros(1, requires_grad=True)
    alpha = torch.tensor(100.0)
    out = fused(x, torch.ones(1), bias, alpha, alpha, 1e-5, -math.inf, math.inf, uniform_grid(2, True), None)
    out.v_hat.backward(torch.full_like(x, 0.1))
    want = rows * torch.tensor(0.1).double().item()
    assert abs(bias.grad.item() - want) <= rounding_of_sum(rows, STRETCH) * want


def code_of(v_hat, alpha):
    return (v_hat.double() / alpha.item()).round()


@pytest.mark.parametrize("channels", [1, 3, 16, 24, 40, 64, 100])
@pytest.mark.parametrize("bins", [None, *EVERY_BINS])
@pytest.mark.parametrize("low, high", BOUNDS)
def test_norm_lsq_equals_the_three_one_after_the_other(native, channels, bins, low, high):
    for pieces, bits, (mean, std) in itertools.product((1, 2), (2, 4), ((0.3, 1.0), (1000.0, 0.1))):
        if mean > 100 * std and (bins or channels == 1):
            continue  # y is too coarse to say in which bin each value lies
        rows = 8 * (30 if pieces == 1 else 4097 // channels + 10)
        check_norm(rows, channels, mean, std, low, high, uniform_grid(bits, signed=low < 0), bins)


def check_norm(rows, channels, mean, std, low, high, grid, bins):
    d = (drawn_for_bins if bins else partial(drawn, 0))(rows, channels, mean, std, low, high, grid, bins)
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(d.inputs[0].shape, generator=g) * ~last(d.tie | d.edge)
    grad_mse = torch.randn(grid.num_levels, generator=g)
    leaves = [t.clone().requires_grad_() for t in (*d.inputs, d.alpha, d.alpha)]
    out = fused(*leaves, 1e-5, low, high, grid, bins)
    differ = flat(code_of(out.v_hat, d.alpha) != d.codes)
    assert not (differ & ~d.tie).any()
    got = norm_gradients([(out.v_hat, grad)], out.mse, leaves, grad_mse)
    want = norm_gradients([(d.v_hat, grad)], d.table.mse, d.leaves, grad_mse)

    # Everything below: float64, rows (M, C).
    x, weight = flat(d.leaves[0].detach()), d.leaves[1].detach()
    m, inverse = x.mean(0), (x.var(0, unbiased=False) + 1e-5).rsqrt()
    normal, scale = (x - m) * inverse, weight * inverse
    y = normal * weight + d.leaves[2].detach()
    r, alpha, c = y.clamp(low, high), d.alpha.double(), flat(d.codes.double())
    u, per_unit = r / alpha, 1 / alpha if bins and bins.in_steps else 1.0
    above = flat(grad.double()).abs()
    if bins:
        assert torch.equal(out.count, d.table.count)
        weigh = (2 * grad_mse / out.count.clamp(min=1)).double().abs()[bin_index(c, grid)] * per_unit
        kept = ~((u < grid.qn) | (u > grid.qp)) if bins.drop_clipped else torch.ones_like(u, dtype=torch.bool)
        away = (r - c * alpha).abs() * kept * per_unit
        off = (d.error + 4 * ROUNDING * (r.abs() + c.abs() * alpha)) * kept * per_unit
        pull, pull_off = weigh * away, weigh * off
        for bin in range(grid.num_levels):  # mse = mean away^2
            here = (c == grid.qn + bin) & kept
            bound = (2 * away * off + off**2)[here].sum() / max(int(here.sum()), 1) + 2e-6 * d.table.mse[bin]
            assert (out.mse[bin] - d.table.mse[bin]).abs() <= bound
    else:
        pull, pull_off = torch.zeros_like(u), torch.zeros_like(u)
    dy, dy_off = above + pull, pull_off + ROUNDING * (above + pull)  # at most
    inside = (y > low) & (y < high)
    dy, dy_off = dy * inside, dy_off * inside
    sums = rounding_of_sum(rows, STRETCH)
    sums_of_alpha = rounding_of_sum(min(rows, 32768 / channels), STRETCHES)
    var = rounding_of_var(rows, m, 1 / inverse)
    bias_off = sums * dy.sum(0) + dy_off.sum(0)
    shift = 4 * ROUNDING * m.abs() * inverse  # of the mean, in standard deviations
    dweight, dbias = want[1].abs(), want[2].abs()
    weight_off = sums * (dy * normal.abs()).sum(0) + (dy_off * normal.abs()).sum(0) + dy.sum(0) * shift + var * dweight
    parts = dy + dbias / rows + normal.abs() * dweight / rows
    x_off = dy_off + bias_off / rows + normal.abs() * weight_off / rows + (8 * ROUNDING + var) * parts
    x_off = scale.abs() * (x_off + shift * dweight / rows)
    u_off = d.error / alpha + 2 * ROUNDING * u.abs()
    along = u.abs() if bins and bins.in_steps else c.abs()
    br_off = (sums_of_alpha * pull * along + pull_off * along + (pull * u_off if bins and bins.in_steps else 0)).sum()
    alpha_off = SCALE * (above * (sums_of_alpha * 2 * max(-grid.qn, grid.qp) + u_off)).sum()
    offs = last(x_off), weight_off, bias_off, alpha_off, br_off
    for name, one, other, off in zip(("dx", "dweight", "dbias", "dalpha", "dalpha_br"), got, want, offs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert ((one - other).abs() <= off + 2 * ROUNDING * other.abs()).all(), (name, (one - other).abs() / off)


def test_codes_behind_a_norm_differ_at_ties_alone(native):
    """And by one. Of a million values, some dozen lie as near a tie as rounding reaches."""
    grid = uniform_grid(4, False)
    d = drawn(0, 8 * 3500, 40, 0.3, 1.0, 0.0, math.inf, grid, None)
    v_hat = fused(*d.inputs, d.alpha, d.alpha, 1e-5, 0.0, math.inf, grid, None).v_hat
    differ = code_of(v_hat, d.alpha) - d.codes
    assert differ.abs().max() <= 1 and not (flat(differ != 0) & ~d.tie).any()
    assert d.tie.sum() < 2e-4 * d.tie.numel() and (differ != 0).sum() <= 30


@pytest.mark.parametrize("channels", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("mean, std", [(0.3, 1.0), (1000.0, 0.1), (-3e4, 1.0)])
def test_statistics_are_the_batchs_whatever_the_mean(native, channels, mean, std):
    g = torch.Generator().manual_seed(0)
    x = last(torch.randn(40_000 // channels * 8, channels, generator=g) * std + mean)
    exact = flat(x).double()
    ones, alpha = torch.ones(channels), torch.tensor(1.0)
    _, _, m, var, _, _ = torch.ops.brqat.norm_lsq_forward(
        x, None, ones, ones, 1e-5, 0.0, math.inf, alpha, 0, 3, False, False, False
    )
    assert ((m - exact.mean(0)).abs() <= ROUNDING * abs(mean) + 1e-6 * std).all()
    want = exact.var(0, unbiased=False)
    assert ((var - want).abs() <= want * rounding_of_var(len(exact), exact.mean(0), want.sqrt())).all()


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_are_those_of_batchnorm(native, momentum):
    """Also whether training forwards, counted, and evaluated behind them."""
    torch.manual_seed(0)
    ours, theirs = (_site(momentum) for _ in range(2))
    theirs.before = None
    for seed in range(3):
        x = last(torch.randn(8 * 20, 24, generator=torch.Generator().manual_seed(seed)) * 2 + 5)
        ours(x)
        nn.BatchNorm2d.forward(theirs.norm, x)
    for key, value in theirs.norm.state_dict().items():
        torch.testing.assert_close(ours.norm.state_dict()[key], value, rtol=2e-6, atol=1e-6)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        want = theirs(nn.functional.relu(nn.BatchNorm2d.forward(theirs.norm, x)))
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-4)


def _site(momentum=0.1) -> QuantConv2d:
    """With a norm of its own before it."""
    torch.manual_seed(0)
    conv = QuantConv2d(24, 8, 1)
    conv.weight_quantizer, conv.input_quantizer = nn.Identity(), LSQ("act", 4)
    conv.input_quantizer.start(torch.tensor(0.8), torch.ones(1), signed=False)
    conv.norm = DeferredNorm(24, momentum=momentum)
    conv.before = Before(conv.norm, nn.ReLU(), 0.0, math.inf, joins=False)
    return conv


def test_one_value_per_channel_is_batchnorms_to_refuse(native):
    conv = _site()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv(torch.randn(1, 24, 1, 1))
    conv.eval()
    with torch.no_grad():
        assert conv(torch.randn(1, 24, 1, 1)).shape == (1, 8, 1, 1)


@pytest.mark.parametrize("bins", [False, True])
def test_operators_are_declared_as_they_are(native, bins):
    g = torch.Generator().manual_seed(0)
    alpha, ops = torch.tensor(0.3), torch.ops.brqat
    tests = ("test_schema", "test_faketensor")
    for v, a in ((torch.randn(4, 6, 3, 3, generator=g), alpha), (torch.randn(7, 9).t(), torch.full((9, 1), 0.3)),
                 (torch.randn(5).bfloat16(), alpha)):  # fmt: skip
        torch.library.opcheck(ops.lsq_forward.default, (v, a, -2, 1, False, True, bins, False, False), test_utils=tests)
        _, _, count, mse = ops.lsq_forward(v, a, -2, 1, False, True, bins, False, False)
        for one_alpha in (False, True):
            args = v * 2, mse if bins else None, v, a, count, -2, 1, False, 1.0, False, False, one_alpha
            torch.library.opcheck(ops.lsq_backward.default, args, test_utils=tests)
    x = last(torch.randn(16, 6, generator=g))
    norm = x, torch.ones(6), torch.zeros(6)
    for shortcut in (None, x / 2):
        args = x, shortcut, *norm[1:], 1e-5, 0.0, math.inf, alpha, 0, 3, bins, False, False
        torch.library.opcheck(ops.norm_lsq_forward.default, args, test_utils=tests)
        _, r, mean, var, count, mse = ops.norm_lsq_forward(*args)
        grads = x * 2, None if shortcut is None else x * 3, mse if bins else None
        args = (*grads, x, None if shortcut is None else r, *norm[1:], mean, var, 1e-5, 0.0, math.inf, alpha, count, 0,
                3, 1.0, False, False, bins)  # fmt: skip
        torch.library.opcheck(ops.norm_lsq_backward.default, args, test_utils=tests)
        args = x, shortcut, *norm[1:], mean, var, 1e-5, 0.0, math.inf, alpha, 0, 3
        torch.library.opcheck(ops.norm_lsq_eval.default, args, test_utils=tests)


def test_update_statistics_is_declared_as_it_is_and_does_as_batchnorm_does(native):
    x, batch_norm = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)) + 2, nn.BatchNorm1d(6, momentum=0.3)
    mean, var = x.mean(0), x.var(0, correction=0)
    args = torch.zeros(6), torch.ones(6), mean, var, 0.3, 7
    torch.library.opcheck(
        torch.ops.brqat.update_statistics.default, args, test_utils=("test_schema", "test_faketensor")
    )
    running = torch.zeros(6), torch.ones(6)
    for _ in range(2):
        batch_norm(x)
        torch.ops.brqat.update_statistics(*running, mean, var, 0.3, 7)
    torch.testing.assert_close(running, (batch_norm.running_mean, batch_norm.running_var), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_statistics_follow_small_ones_exactly(native, momentum):
    mean, var = torch.tensor([1e-9, -3e-5]), torch.tensor([1e-12, 1e-6])
    running = torch.zeros(2), torch.ones(2)
    torch.ops.brqat.update_statistics(*running, mean, var, momentum, 2)
    torch.testing.assert_close(running[0], momentum * mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(running[1], momentum * 2 * var + (1 - momentum), rtol=1e-6, atol=0)
    assert [t._version for t in running] == [1, 1]


def fused_by(op, v, alpha):
    """v_hat of a tensor (4, 3, 2, 2) by either operator."""
    if op == "lsq":
        return kernels.lsq(v, alpha, alpha, uniform_grid(2, True), SCALE, False, Bins()).v_hat
    one, zero = torch.ones(3), torch.zeros(3)
    norm = Norm(one, zero, zero.clone(), one.clone(), 0.1, True, 1e-5, 0.0, math.inf)
    return kernels.norm_lsq(v, None, norm, alpha, alpha, uniform_grid(2, False), SCALE, Bins())[0].v_hat


@pytest.fixture
def v_and_alpha():
    v = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    v = v.contiguous(memory_format=torch.channels_last)
    return v.requires_grad_(), torch.tensor(0.5, requires_grad=True)


@pytest.mark.parametrize("op", ["lsq", "norm_lsq"])
class TestNodesAreAsTorchsOwn:
    def test_a_second_backward_says_that_the_values_are_gone(self, native, op, v_and_alpha):
        loss = fused_by(op, *v_and_alpha).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    def test_what_was_saved_may_not_change_in_place(self, native, op, v_and_alpha):
        v, alpha = v_and_alpha
        x = v * 1.0
        loss = fused_by(op, x, alpha).sum()
        x.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_hooks_see_what_is_saved(self, native, op, v_and_alpha):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
            fused_by(op, *v_and_alpha).sum().backward()
        assert v_and_alpha[0].shape in seen

    def test_hooks_may_lay_out_anew_what_is_saved(self, native, op, v_and_alpha):
        want = torch.autograd.grad(fused_by(op, *v_and_alpha).square().sum(), v_and_alpha)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
            got = torch.autograd.grad(fused_by(op, *v_and_alpha).square().sum(), v_and_alpha)
        torch.testing.assert_close(got, want)

    def test_it_can_be_checkpointed(self, native, op, v_and_alpha):
        v, alpha = v_and_alpha
        want = torch.autograd.grad(fused_by(op, v, alpha).square().sum(), v_and_alpha)
        block = checkpoint(partial(fused_by, op), v, alpha, use_reentrant=False)
        assert all(map(torch.equal, torch.autograd.grad(block.square().sum(), v_and_alpha), want))

    def test_a_frozen_alpha_gets_nothing(self, native, op, v_and_alpha):
        v, alpha = v_and_alpha
        fused_by(op, v, alpha.detach()).sum().backward()
        assert alpha.grad is None and v.grad is not None

    def test_nothing_is_kept_where_nothing_is_differentiated(self, native, op, v_and_alpha):
        with torch.no_grad():
            assert fused_by(op, *v_and_alpha).grad_fn is None
        v, alpha = v_and_alpha
        assert not fused_by(op, v.detach(), alpha.detach()).requires_grad

    def test_forward_mode_is_refused(self, native, op, v_and_alpha):
        v, alpha = v_and_alpha
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="kernels=torch"):
            fused_by(op, torch.autograd.forward_ad.make_dual(v.detach(), v.detach()), alpha)


def test_a_second_call_builds_nothing(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(builder, "_build", lambda flags, library: (calls.append(library), library.touch()))
    assert builder.built(tmp_path / "new") == builder.built(tmp_path / "new")
    assert len(calls) == 1


def test_another_source_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "_build", lambda flags, library: library.touch())
    before = builder.built(tmp_path)
    sources = shutil.copytree(builder.SOURCES, tmp_path / "native")
    monkeypatch.setattr(builder, "SOURCES", sources)
    assert builder.built(tmp_path) == before
    with (sources / "lsq.h").open("a") as file:
        file.write("// changed\n")
    assert builder.built(tmp_path) != before


def test_what_a_killed_process_left_under_our_number_is_swept_away(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cpp_extension,
        "load",
        lambda name, *_, build_directory, **__: (Path(build_directory) / f"{name}.so").touch(),
    )
    library = tmp_path / "brqat-0.so"
    (tmp_path / f"brqat-0.{os.getpid()}").mkdir()
    (tmp_path / f"brqat-0.{os.getpid()}" / "lock").touch()
    builder._build([], library)
    assert [path.name for path in tmp_path.iterdir()] == [library.name]


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(builder, "FOLDER", tmp_path)
    monkeypatch.setattr(builder, "_failure", None)


def test_without_a_compiler_auto_says_what_it_costs(no_compiler, caplog):
    caplog.set_level(logging.WARNING)
    assert kernels.choose("auto", CPU) == "torch"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert kernels.COST in record.getMessage() and "no-such-compiler" in record.getMessage()
    assert not kernels.native_on(CPU)


def test_without_a_compiler_native_is_refused_with_what_to_write(no_compiler):
    with pytest.raises(ValueError, match=r"no-such-compiler.*Write kernels=auto or torch"):
        kernels.choose("native", CPU)


def building(folder: Path) -> subprocess.Popen:
    """A process that builds one of the sources, for time, into a library in the folder."""
    source = folder.parent / "native"
    source.mkdir(exist_ok=True)
    shutil.copy(builder.SOURCES / "feed.cpp", source)
    code = f"from pathlib import Path; from brqat.kernels import native; native.SOURCES = Path({str(source)!r}); "
    env = os.environ | {"BRQAT_KERNELS": str(folder), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", code + "native.load()"]
    return subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_two_processes_that_build_at_once_share_one_library(native, tmp_path):
    folder = tmp_path / "built"
    both = [building(folder), building(folder)]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.suffix for path in sorted(folder.iterdir())] == [".lock", ".so"]


@pytest.mark.slow
def test_a_killed_build_does_not_stop_the_next(native, tmp_path):
    folder = tmp_path / "built"
    process = building(folder)
    while not list(folder.glob("*/build.ninja")):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("*.so"))
    assert building(folder).wait() == 0
    assert len(list(folder.glob("*.so"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_other_instruction_sets_give_the_same(native, tmp_path, instructions):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "ATEN_CPU_CAPABILITY": instructions}
    command = [sys.executable, __file__, str(builder.SOURCES), str(tmp_path)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]


@pytest.mark.slow
def test_a_fault_in_the_sources_is_found(native, tmp_path):
    """One operator of if_between."""
    file, right, wrong = "lsq.h", "return if_less(low, x, if_less(x,", "return if_at_most(low, x, if_less(x,"
    sources = shutil.copytree(builder.SOURCES, tmp_path / "native")
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, __file__, str(sources), str(tmp_path)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 1 and "Case(" in ended.stdout, ended.stdout + ended.stderr


if __name__ == "__main__":
    builder.SOURCES, builder.FOLDER = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    kernels.choose("native", torch.device("cpu"))
    failed = run_all(2000, 200)
    print(*failed, sep="\n")
    sys.exit(bool(failed))
