"""Bin Regularization: its weighing against loops, its curvature, and where pure BR flow ends."""

import pytest
import torch

from brqat.quantizer.base import Seen
from brqat.quantizer.lsq import LSQ
from brqat.quantizer.sign import Sign
from brqat.regularizer.binreg import BinReg
from brqat.regularizer.none import NoRegularizer


def site_with(v, kind="weight", bits=2, alpha=0.4, make=LSQ, per_channel=False):
    site = make(kind, bits, per_channel=per_channel) if make is LSQ else make(kind)
    signed = bool(v.min() < 0)
    mean_abs = v.detach().abs().flatten(1).mean(1).view(-1, *[1] * (v.dim() - 1)) if per_channel else v.abs().mean()
    site.start(mean_abs.detach(), v.detach(), signed)
    site.alpha = torch.nn.Parameter(site.alpha.detach().double() if per_channel else torch.tensor(alpha).double())
    site.seen = Seen(v.shape, v, site.codes(v.detach(), site.alpha.detach()).to(torch.int16))
    return site


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(site, normalize, in_steps, drop):
    """The docstring of binreg.py, element by element."""
    v, codes = site.seen.v, site.seen.codes
    alpha = site.alpha.expand_as(v).flatten().tolist()
    pairs = list(zip(v.detach().flatten().tolist(), codes.flatten().tolist(), alpha, strict=True))
    if drop:
        pairs = [(x, c, a) for x, c, a in pairs if site.grid.qn <= x / a <= site.grid.qp]
    squares = {}
    for x, c, a in pairs:
        squares.setdefault(c, []).append(((x - c * a) / (a if in_steps else 1)) ** 2)
    if normalize == "paper":
        return sum(sum(s) / len(s) for s in squares.values())
    total = sum(sum(s) for s in squares.values()) / (v.shape[0] if site.kind == "act" else 1)
    return total / (v[0].numel() if normalize == "fan_in" else 1)


@pytest.mark.parametrize("clipped", ["keep", "drop"])
@pytest.mark.parametrize("units", ["absolute", "alpha"])
@pytest.mark.parametrize("normalize", ["paper", "element", "fan_in"])
@pytest.mark.parametrize("kind", ["weight", "act"])
def test_every_weighing_equals_its_definition(kind, normalize, units, clipped):
    v = randn(6, 3, 2, 2) if kind == "weight" else randn(6, 3, 2, 2).relu()
    site = site_with(v, kind)
    ours = BinReg(1, 1, normalize, units, clipped).site_penalty(site, site.alpha)
    assert ours.item() == pytest.approx(by_hand(site, normalize, units == "alpha", clipped == "drop"))


@pytest.mark.parametrize("make", [LSQ, Sign])
def test_known_answer_through_the_regularizer(make):
    v = torch.tensor([-0.9, -0.45, -0.1, 0.02, 0.12, 0.44, 0.61, 1.3], dtype=torch.float64)
    site = site_with(v, make=make)
    penalty = BinReg(1).site_penalty(site, site.alpha).item()
    sign = sum(sum((x - s * 0.4) ** 2 for x in part) / len(part) for s, part in
               ((-1, [-0.9, -0.45, -0.1]), (1, [0.02, 0.12, 0.44, 0.61, 1.3])))  # fmt: skip
    assert penalty == pytest.approx(0.306 if make is LSQ else sign)


def test_element_pulls_every_weight_alike_whatever_the_size_of_its_layer():
    small, large = randn(1, 50).requires_grad_(), randn(1, 5000, seed=1).requires_grad_()
    for v in (small, large):
        site = site_with(v)
        BinReg(1, normalize="element").site_penalty(site, site.alpha.detach()).backward()
        torch.testing.assert_close(v.grad, 2 * (v.detach() - site.seen.codes * 0.4))


def test_units_of_alpha_do_not_change_when_layer_and_alpha_are_scaled():
    v = randn(40)
    reg = BinReg(1, units="alpha")
    one, seven = site_with(v), site_with(7 * v, alpha=2.8)
    torch.testing.assert_close(reg.site_penalty(one, one.alpha), reg.site_penalty(seven, seven.alpha))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("clipped", ["keep", "drop"])
@pytest.mark.parametrize("normalize", ["paper", "element", "fan_in"])
def test_curvature_is_the_second_derivative(normalize, clipped, per_channel):
    """By finite differences of the gradient, with the codes held, per alpha; exact since the penalty is quadratic."""
    site = site_with(randn(4, 60), bits=3, per_channel=per_channel)
    reg = BinReg(1, normalize=normalize, clipped=clipped)
    second = torch.zeros_like(site.alpha)
    for index in range(site.alpha.numel()):
        slopes = []
        for step in (0.0, 1e-7):  # so small that drop's mask cannot change
            alpha = site.alpha.detach().clone()
            alpha.view(-1)[index] += step
            alpha.requires_grad_()
            slopes.append(torch.autograd.grad(reg.site_penalty(site, alpha), alpha)[0].view(-1)[index])
        second.data.view(-1)[index] = (slopes[1] - slopes[0]) / 1e-7
    assert reg.curvature(site) == pytest.approx(second.max().item(), rel=1e-5)


def test_curvature_of_a_full_grid_is_the_papers_h():
    for bits, h in ((2, 12), (3, 88), (4, 688)):
        assert BinReg(1).curvature(site_with(randn(100_000) * 2, bits=bits)) == pytest.approx(h)
    assert BinReg(1, units="alpha").curvature(site_with(randn(10_000))) == pytest.approx(12 / 0.4**2)


def test_pure_flow_follows_its_closed_form_without_a_flip_into_dirac_bins():
    """residual_j(t) = (1 - 2 * eta * lambda / N_i)^t * residual_j(0), alpha fixed."""
    v = randn(300).requires_grad_()
    site = site_with(v)
    first = site.seen.codes.clone()
    counts = {c: int((first == c).sum()) for c in first.unique().tolist()}
    start = (v - first * 0.4).detach().clone()
    eta, strength = 0.4, 10.0
    decay = torch.tensor([1 - 2 * eta * strength / counts[c] for c in first.tolist()], dtype=torch.float64)
    assert (decay.abs() < 1).all()
    reg = BinReg(strength)
    for step in range(1, 201):
        v.grad = None
        site.seen = Seen(v.shape, v, site.codes(v.detach(), site.alpha.detach()).to(torch.int16))
        assert torch.equal(site.seen.codes, first)
        (strength * reg.site_penalty(site, site.alpha.detach())).backward()
        with torch.no_grad():
            v -= eta * v.grad
        if step % 50 == 0:
            torch.testing.assert_close(v.detach() - first * 0.4, start * decay**step, atol=1e-12, rtol=1e-9)
    for code in counts:
        assert v.detach()[first == code].std(unbiased=False) < 1e-2 * start[first == code].std(unbiased=False) + 1e-12


def test_only_sites_with_a_lambda_and_not_exempt_take_part():
    weight, act = site_with(randn(20)), site_with(randn(20).relu(), "act")
    exempt = site_with(randn(20))
    exempt.exempt = True
    penalty = BinReg(1.0, 0.0)([weight, act, exempt], lambda s: s.alpha)
    assert penalty.act is None
    torch.testing.assert_close(penalty.weight, BinReg(1).site_penalty(weight, weight.alpha))
    assert NoRegularizer()([weight, act], lambda s: s.alpha) == (None, None)


@pytest.mark.parametrize("schedule, start, half", [("constant", 1, 1), ("ramp", 0, 0.5), ("cosine", 0, 0.5)])
def test_lambda_schedule(schedule, start, half):
    reg = BinReg(4.0, 2.0, schedule=schedule)
    assert [reg.lambda_at("weight", p) for p in (0, 0.5, 1)] == pytest.approx([4 * start, 4 * half, 4])
    assert reg.lambda_at("act", 1) == pytest.approx(2)


@pytest.mark.parametrize("bad, word", [
    ({"lambda_br": -1}, "zero or above"), ({"lambda_br": float("nan")}, "finite"), ({"lambda_br": "much"}, "strength"),
    ({"normalize": "mean"}, "paper, element, fan_in"), ({"units": "steps"}, "absolute, alpha"),
    ({"clipped": "no"}, "keep, drop"), ({"schedule": "step"}, "constant, ramp, cosine"),
])  # fmt: skip
def test_bad_values_are_refused(bad, word):
    with pytest.raises(ValueError, match=word):
        BinReg(**{"lambda_br": 1.0} | bad)
