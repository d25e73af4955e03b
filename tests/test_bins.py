"""The bin table against the paper's own words, bin by bin, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brqat.bins import bin_table
from brqat.grid import SIGN_GRID, uniform_grid
from brqat.quantizer.lsq import lsq, lsq_codes
from brqat.quantizer.sign import sign_codes

W = [-0.9, -0.45, -0.1, 0.02, 0.12, 0.44, 0.61, 1.3]


def paper_loss(v, codes, alpha):
    """Eq. 4 and 5: per non-empty bin, squared distance of the mean to the level plus the biased variance."""
    loss = v.new_zeros(())
    for code in codes.unique():
        members = v[codes == code]
        loss = loss + (members.mean() - code * alpha).square() + members.var(unbiased=False)
    return loss


def loss_of(v, codes, alpha, grid):
    return bin_table(v, codes, alpha, grid).mse.sum()


def sample(size, seed, spread=1.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def test_known_answer():
    v = torch.tensor(W, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    grid = uniform_grid(2, signed=True)
    v_hat, codes = lsq(v, alpha, grid)
    assert codes.tolist() == [-2, -1, 0, 0, 0, 1, 1, 1]
    loss = loss_of(v, codes, alpha, grid)
    assert loss.item() == pytest.approx(0.306, abs=1e-12)
    loss.backward()
    assert alpha.grad.item() == pytest.approx(-1.2666667, abs=5e-8)
    expected = [-0.2, -0.1, -0.0666667, 0.0133333, 0.08, 0.0266667, 0.14, 0.6]
    torch.testing.assert_close(v.grad, torch.tensor(expected, dtype=torch.float64), atol=5e-8, rtol=0)
    assert (v - v_hat).square().mean().item() == pytest.approx(0.111625, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.booleans(), st.integers(1, 300), st.floats(0.01, 3.0), st.integers(0, 10_000))
def test_identity_and_gradients_equal_the_papers_formula(bits, signed, size, step, seed):
    grid = uniform_grid(bits, signed or False) if bits > 1 else uniform_grid(1, False)
    v = sample(size, seed).requires_grad_()
    alpha = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    codes = lsq_codes(v, alpha, grid).detach()
    ours, paper = loss_of(v, codes, alpha, grid), paper_loss(v, codes, alpha)
    torch.testing.assert_close(ours, paper)
    for mine, theirs in zip(torch.autograd.grad(ours, (v, alpha)), torch.autograd.grad(paper, (v, alpha)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("bits, signed", [(2, True), (4, True), (8, True), (2, False), (4, False)])
def test_euler(bits, signed):
    grid = uniform_grid(bits, signed)
    v = sample(500, bits).requires_grad_()
    alpha = torch.tensor(0.21, dtype=torch.float64, requires_grad=True)
    loss = loss_of(v, lsq_codes(v, alpha, grid).detach(), alpha, grid)
    dv, dalpha = torch.autograd.grad(loss, (v, alpha))
    assert ((dv * v).sum() + alpha * dalpha).item() == pytest.approx(2 * loss.item())


def test_invariances():
    grid, alpha = uniform_grid(3, signed=True), torch.tensor(0.3, dtype=torch.float64)
    v = sample(211, 5)
    loss = loss_of(v, lsq_codes(v, alpha, grid), alpha, grid)
    scaled = loss_of(7 * v, lsq_codes(7 * v, 7 * alpha, grid), 7 * alpha, grid)
    torch.testing.assert_close(scaled, 49 * loss)
    order = torch.randperm(211, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss_of(v[order], lsq_codes(v[order], alpha, grid), alpha, grid), loss)
    repeated = v.repeat_interleave(5)
    torch.testing.assert_close(loss_of(repeated, lsq_codes(repeated, alpha, grid), alpha, grid), loss)


def test_empty_and_one_element_bins():
    grid, alpha = uniform_grid(4, signed=True), torch.tensor(1.0, dtype=torch.float64)
    v = torch.tensor([0.25, 3.1], dtype=torch.float64)
    table = bin_table(v, lsq_codes(v, alpha, grid), alpha, grid)
    assert table.count.tolist() == [0] * 8 + [1, 0, 0, 1] + [0] * 4
    assert table.mse.tolist() == pytest.approx([0] * 8 + [0.0625, 0, 0, 0.01] + [0] * 4)
    empty = bin_table(torch.empty(0, requires_grad=True), torch.empty(0), torch.tensor(1.0), grid)
    assert empty.count.sum() == 0 and empty.mse.tolist() == [0.0] * 16
    empty.mse.sum().backward()


def test_gradients_by_finite_differences():
    for grid in (uniform_grid(2, True), uniform_grid(3, False), SIGN_GRID):
        v = sample(40, 3).requires_grad_()
        alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        codes = (sign_codes(v) if grid == SIGN_GRID else lsq_codes(v, alpha, grid)).detach()
        weights = torch.linspace(0.5, 2, grid.num_levels, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda v, a, codes=codes, grid=grid, weights=weights: (bin_table(v, codes, a, grid).mse * weights).sum(),
            (v, alpha),
        )


def test_curvature_along_alpha_is_the_closed_form():
    """h = 2 * sum of i^2 over the bins: 12, 88, 688, 2796288 signed, 2, 28, 2480 unsigned."""
    for bits, signed, h in [(2, True, 12), (3, True, 88), (4, True, 688), (8, True, 2_796_288), (1, False, 2),
                            (2, False, 28), (4, False, 2480)]:  # fmt: skip
        grid = uniform_grid(bits, signed)
        codes = torch.tensor(list(grid.codes), dtype=torch.float64).repeat(3)
        v = codes * 0.1 + 0.01
        slope = []
        for a in (0.1, 0.2):
            alpha = torch.tensor(a, dtype=torch.float64, requires_grad=True)
            slope.append(torch.autograd.grad(loss_of(v, codes, alpha, grid), alpha)[0].item())
        assert (slope[1] - slope[0]) / 0.1 == pytest.approx(h)


def test_per_channel_alphas_share_the_bins_of_their_codes():
    grid = uniform_grid(2, True)
    v = sample((3, 50), 9).requires_grad_()
    alpha = torch.tensor([[0.2], [0.5], [1.1]], dtype=torch.float64, requires_grad=True)
    codes = lsq_codes(v, alpha, grid).detach()
    loss = loss_of(v, codes, alpha, grid)
    direct = sum((v - codes * alpha)[codes == c].square().mean() for c in codes.unique())
    torch.testing.assert_close(loss, direct)
    for mine, theirs in zip(
        torch.autograd.grad(loss, (v, alpha)), torch.autograd.grad(direct, (v, alpha)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_drop_clipped_leaves_out_what_lies_beyond_the_end_levels():
    grid, alpha = uniform_grid(2, True), torch.tensor(0.4, dtype=torch.float64)
    v = torch.tensor([*W, -5.0, 0.4, -0.8], dtype=torch.float64, requires_grad=True)  # ends exactly on levels stay
    codes = lsq_codes(v, alpha, grid).detach()
    table = bin_table(v, codes, alpha, grid, drop_clipped=True)
    inside = (v / alpha >= -2) & (v / alpha <= 1)
    kept = bin_table(v[inside], codes[inside], alpha, grid)
    torch.testing.assert_close(table.count, kept.count)
    torch.testing.assert_close(table.mse, kept.mse)
    (dv,) = torch.autograd.grad(table.mse.sum(), v)
    assert (dv[~inside] == 0).all() and (dv[inside] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_input_is_summed_in_high_precision(dtype):
    grid = uniform_grid(2, False)
    v = sample(100_000, 2).abs().to(dtype).requires_grad_()
    alpha = torch.tensor(0.7, requires_grad=True)
    codes = lsq_codes(v, alpha, grid).detach()
    table = bin_table(v, codes, alpha, grid)
    exact = bin_table(v.detach().double(), codes, alpha.detach().double(), grid)
    assert table.mse.dtype == torch.float32
    torch.testing.assert_close(table.mse.double(), exact.mse, rtol=1e-5, atol=0)
    table.mse.sum().backward()
    assert v.grad.dtype == dtype and alpha.grad.dtype == torch.float32


def test_nan_reaches_the_loss_and_does_not_crash():
    grid, alpha = uniform_grid(2, True), torch.tensor(0.4)
    v = torch.tensor([0.1, float("nan"), float("inf"), -0.3])
    _, codes = lsq(v, alpha, grid)
    assert torch.isnan(loss_of(v[:2], codes[:2], alpha, grid))
    assert torch.isinf(loss_of(v[2:], codes[2:], alpha, grid))


def test_result_does_not_depend_on_memory_layout():
    grid, alpha = uniform_grid(2, True), torch.tensor(0.4)
    v = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    codes = lsq_codes(v, alpha, grid)
    plain = bin_table(v, codes, alpha, grid)
    last = bin_table(
        v.contiguous(memory_format=torch.channels_last),
        codes.contiguous(memory_format=torch.channels_last),
        alpha,
        grid,
    )
    assert torch.equal(plain.count, last.count)
    torch.testing.assert_close(plain.mse, last.mse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (4, 1, 5, 5), (1, 6, 5, 5), (4, 6, 5, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_shapes_whose_layout_is_ambiguous(shape, memory_format):
    grid, alpha = uniform_grid(2, True), torch.tensor(0.4)
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format).requires_grad_()
    flat = v.detach().flatten().requires_grad_()
    for x in (v, flat):
        bin_table(x, lsq_codes(x, alpha, grid).detach(), alpha, grid).mse.sum().backward()
    torch.testing.assert_close(v.grad.flatten(), flat.grad)
