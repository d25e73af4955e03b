"""LSQ and Sign against scalar references that share no code with them."""

import math
from fractions import Fraction

import pytest
import torch

from brqat.grid import SIGN_GRID, uniform_grid
from brqat.quantizer.base import gradient_scale
from brqat.quantizer.lsq import LSQ, lsq
from brqat.quantizer.sign import Sign

GRIDS = [(bits, True) for bits in range(2, 9)] + [(bits, False) for bits in range(1, 9)]


def scalar_lsq(v, alpha, qn, qp):
    """Eq. 1-5 for one number: (v_hat, code, dv_hat/dv, dv_hat/dalpha). Python's round is half to even."""
    u = v / alpha
    code = round(Fraction(min(max(u, qn), qp)))
    if u <= qn:
        return code * alpha, code, 0.0, float(qn)
    if u >= qp:
        return code * alpha, code, 0.0, float(qp)
    return code * alpha, code, 1.0, code - u


def values(seed, grid, alpha, count=400):
    """Values all over the grid and beyond it, half steps, levels and both ends among them."""
    generator = torch.Generator().manual_seed(seed)
    spread = (torch.rand(count, generator=generator, dtype=torch.float64) * 1.5 - 0.25) * (grid.qp - grid.qn) + grid.qn
    ends = torch.tensor([grid.qn, grid.qp, 0.0, grid.qn + 0.5, grid.qp - 0.5, 0.5, -0.5], dtype=torch.float64)
    return torch.cat([spread, ends, torch.tensor([grid.qn - 1e-9, grid.qp + 1e-9])]) * alpha


@pytest.mark.parametrize("bits, signed", GRIDS)
def test_lsq_equals_the_scalar_reference(bits, signed):
    grid = uniform_grid(bits, signed)
    alpha = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)  # exact division: ties stay ties
    v = values(bits, grid, 0.25).requires_grad_()
    upstream = torch.randn(v.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v_hat, codes = lsq(v, alpha, grid, scale=0.125)
    (v_hat * upstream).sum().backward()
    expected = [scalar_lsq(x, 0.25, *grid) for x in v.tolist()]
    assert v_hat.tolist() == [e[0] for e in expected]
    assert codes.tolist() == [e[1] for e in expected]
    assert v.grad.tolist() == [e[2] * g for e, g in zip(expected, upstream.tolist(), strict=True)]
    dalpha = math.fsum(e[3] * g for e, g in zip(expected, upstream.tolist(), strict=True)) * 0.125
    assert alpha.grad.item() == pytest.approx(dalpha, rel=1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_per_channel_equals_each_channel_alone(bits):
    grid = uniform_grid(bits, True)
    v = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = torch.linspace(0.1, 0.5, 5, dtype=torch.float64).view(5, 1, 1, 1).requires_grad_()
    together, _ = lsq(v, alpha, grid)
    together.square().sum().backward()
    for channel in range(5):
        own = alpha.detach()[channel, 0, 0, 0].clone().requires_grad_()
        alone, _ = lsq(v[channel], own, grid)
        alone.square().sum().backward()
        assert torch.equal(together[channel], alone)
        torch.testing.assert_close(alpha.grad[channel, 0, 0, 0], own.grad)


def test_codes_are_found_in_float32_under_bfloat16():
    alpha, grid = torch.tensor(0.1), uniform_grid(4, True)
    v = torch.linspace(-1, 1, 4001).bfloat16()
    v_hat, codes = lsq(v, alpha, grid)
    assert v_hat.dtype == torch.bfloat16
    expected = [scalar_lsq(x, alpha.item(), *grid)[1] for x in v.double().tolist()]
    # alpha is not a power of two, so a float32 quotient may land on the other side of a tie; none is allowed elsewhere.
    wrong = [(x, c, e) for x, c, e in zip(v.tolist(), codes.tolist(), expected, strict=True) if c != e]
    assert all(abs(abs(x / 0.1) % 1 - 0.5) < 1e-5 for x, *_ in wrong)
    in_bf16 = (v / alpha.bfloat16()).clamp(*grid).round()
    assert (in_bf16 != codes).sum() > 10  # what rounding in bfloat16 would have misplaced


def test_gradient_scale_leaves_the_batch_out():
    alpha = torch.tensor(1.0)
    assert gradient_scale(torch.empty(7, 3, 4, 4), "act", alpha, 3) == 1 / math.sqrt(48 * 3)
    assert gradient_scale(torch.empty(64, 3, 4, 4), "act", alpha, 3) == 1 / math.sqrt(48 * 3)
    assert gradient_scale(torch.empty(8, 3, 3, 3), "weight", alpha, 1) == 1 / math.sqrt(216)
    assert gradient_scale(torch.empty(8, 3, 3, 3), "weight", torch.ones(8, 1, 1, 1), 1) == 1 / math.sqrt(27)


def started(site, v, signed):
    site.start(v.abs().mean(), v.flatten(), signed)
    return site


def test_lsq_start():
    v = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    site = started(LSQ("weight", 3), v, True)
    assert site.alpha.item() == pytest.approx(2 * v.abs().mean().item() / math.sqrt(3))


@pytest.mark.parametrize("bits, signed", [(2, True), (4, True), (2, False), (8, False)])
def test_mse_start_is_the_best_of_a_fine_search(bits, signed):
    v = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    v = v if signed else v.relu()
    site = started(LSQ("weight" if signed else "act", bits, start="mse"), v, signed)

    def error(alpha):
        return (v - lsq(v, torch.tensor(alpha), site.grid)[0]).square().mean().item()

    best = min(error(a) for a in torch.logspace(-4, 1, 4000).tolist())
    assert error(site.alpha.item()) <= best * 1.002


def test_mse_start_per_channel_is_each_channels_own():
    w = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1], [5], [0.01]])
    together = LSQ("weight", 2, per_channel=True, start="mse")
    together.start(w.abs().mean(1, keepdim=True), w, True)
    for channel in range(4):
        alone = started(LSQ("weight", 2, start="mse"), w[channel], True)
        assert together.alpha[channel].item() == pytest.approx(alone.alpha.item(), rel=1e-5)


@pytest.mark.parametrize("v", [torch.zeros(5), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])])
def test_no_step_size_from_nothing(v):
    with pytest.raises(ValueError, match="no step size follows"):
        started(LSQ("weight", 2), v, True)


def test_a_site_that_was_not_started_says_so():
    with pytest.raises(RuntimeError, match="calibrate"):
        LSQ("act", 2)(torch.ones(3))


def test_sign_is_two_levels_with_learned_alpha():
    v = torch.tensor([-2.0, -0.1, 0.0, 0.3, 5.0], requires_grad=True)
    site = Sign("weight")
    site.start(v.detach().abs().mean(), v.detach(), True)
    assert site.grid == SIGN_GRID
    assert site.alpha.item() == pytest.approx(7.4 / 5)
    out = site(v)
    assert out.tolist() == pytest.approx([-1.48, -1.48, 1.48, 1.48, 1.48])
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (out * upstream).sum().backward()
    assert v.grad.tolist() == upstream.tolist()
    assert site.alpha.grad.item() == pytest.approx((-1 - 2 + 3 + 4 + 5) / math.sqrt(5))


def test_sign_start_has_the_least_squared_error():
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    site = Sign("weight")
    site.start(w.abs().mean(), w, True)
    least = min((w - a * w.sign()).square().mean().item() for a in torch.linspace(0.5, 1.2, 701).tolist())
    assert (w - site(w)).square().mean().item() <= least + 1e-6


@pytest.mark.parametrize("make, word", [
    (lambda: Sign("act"), "1-bit weights"),
    (lambda: Sign("weight", bits=2), "1-bit weights"),
    (lambda: LSQ("weight", 1), "quantizer=sign"),
    (lambda: LSQ("act", 2, per_channel=True), "per input channel"),
    (lambda: LSQ("act", 2, start="max"), "lsq, mse"),
])  # fmt: skip
def test_impossible_sites_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_grid_and_alpha_travel_in_the_state_dict():
    site = started(LSQ("act", 3), torch.randn(100), signed=True)
    other = LSQ("act", 3)
    other.load_state_dict(site.state_dict())
    assert other.grid == site.grid and torch.equal(other.alpha, site.alpha)
    with pytest.raises(ValueError, match="other bit-width"):
        LSQ("act", 4).load_state_dict(site.state_dict())
