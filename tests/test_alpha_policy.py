"""Frozen means frozen, learnable means cross-entropy alone, backprop means both; and when backprop runs away."""

import itertools
import logging
from functools import partial

import pytest
import torch
from torch import nn

from brqat.alpha_policy import POLICIES, AlphaPolicy, PositiveAlphas
from brqat.layers import sites
from brqat.levels import alpha_gradients, recording
from brqat.quantizer.base import Seen
from brqat.quantizer.lsq import LSQ
from brqat.regularizer.binreg import BinReg

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-2),
}


def step(model, pictures, policy, regularizer, optimizer, set_to_none=True, lambdas=(1.0, 0.1)):
    found = sites(model)
    with recording(found.values()):
        logits = model(pictures)
        loss = nn.functional.cross_entropy(logits, torch.arange(len(pictures)) % 4)
        penalty = regularizer(found.values(), policy.seen_by_regularizer)
    for strength, part in zip(lambdas, penalty, strict=True):
        if part is not None:
            loss = loss + strength * part
    optimizer.zero_grad(set_to_none=set_to_none)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_alpha_stands_still(quantized, pictures, name, set_to_none, weight_decay, fused):
    """After 5 steps of learning, with momentum and moments built up, and 20 more under the freeze."""
    make = partial(OPTIMIZERS[name], weight_decay=weight_decay, fused=fused)
    policy, regularizer = AlphaPolicy("frozen", "frozen"), BinReg(1.0, 0.1)
    found = sites(quantized)
    optimizer = policy.optimizer(make, quantized, found.values())
    start = {n: s.alpha.detach().clone() for n, s in found.items()}
    for _ in range(5):
        step(quantized, pictures, policy, regularizer, optimizer, set_to_none)
    assert any(not torch.equal(start[n], s.alpha) for n, s in found.items())  # the warmup did learn
    policy.freeze(found.values(), optimizer)
    frozen = {n: s.alpha.detach().clone() for n, s in found.items()}
    weight = quantized.conv2.weight.detach().clone()
    for _ in range(20):
        step(quantized, pictures, policy, regularizer, optimizer, set_to_none)
    assert all(torch.equal(frozen[n], s.alpha) for n, s in found.items())
    assert not torch.equal(weight, quantized.conv2.weight)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in optimizer.state}
    for site in found.values():
        assert not site.alpha.requires_grad and site.alpha.grad is None and id(site.alpha) not in held


def test_each_kind_follows_its_own_policy(quantized, pictures):
    policy, found = AlphaPolicy("learnable", "frozen"), sites(quantized)
    optimizer = policy.optimizer(OPTIMIZERS["sgd"], quantized, found.values())
    policy.freeze(found.values(), optimizer)
    before = {n: s.alpha.detach().clone() for n, s in found.items()}
    for _ in range(3):
        step(quantized, pictures, policy, BinReg(1.0, 0.1), optimizer)
    moved = {s.kind for n, s in found.items() if not torch.equal(before[n], s.alpha)}
    assert moved == {"weight"}


@pytest.mark.parametrize("weight, act", list(itertools.product(POLICIES, POLICIES)))
def test_the_regularizer_reaches_alpha_only_under_backprop(quantized, pictures, weight, act):
    policy, regularizer, found = AlphaPolicy(weight, act), BinReg(1.0, 1.0), sites(quantized)
    optimizer = policy.optimizer(OPTIMIZERS["momentum"], quantized, found.values())
    quantized.eval()
    labels = torch.arange(len(pictures)) % 4
    strength = {"weight": 1.0, "act": 1.0}
    norms = alpha_gradients(quantized, pictures, labels, found, regularizer, policy, strength, optimizer)
    for name, site in found.items():
        reached = policy.of[site.kind] == "backprop" and not site.exempt
        assert (norms[name]["alpha_grad_br"] > 0) == reached
        assert (norms[name]["stability_index"] > 0) == reached
        assert norms[name]["alpha_grad_ce"] > 0
    assert norms["conv1.weight"]["alpha_grad_br_upstream"] > 0  # of conv2's input, through conv1
    assert norms["fc.weight"]["alpha_grad_br_upstream"] == 0  # no site lies above the last layer


def test_learnable_gives_alpha_the_gradient_of_cross_entropy_to_the_last_bit(quantized, pictures):
    """Under any penalty on weights; one on activations reaches the alphas of earlier layers through the network."""
    policy, found, grads = AlphaPolicy("learnable", "learnable"), sites(quantized), []
    quantized.eval()
    for regularizer in (BinReg(0.0), BinReg(50.0)):
        optimizer = policy.optimizer(partial(torch.optim.SGD, lr=1e-30), quantized, found.values())
        step(quantized, pictures, policy, regularizer, optimizer)
        grads.append([s.alpha.grad.clone() for s in found.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_backprop_matches_finite_differences(quantized, pictures):
    """d(penalty of a weight site)/d alpha, in float64, with the codes it saw."""
    quantized.double()
    policy, regularizer, found = AlphaPolicy("backprop", "backprop"), BinReg(1.0, 0.0), sites(quantized)
    with recording(found.values()):
        quantized(pictures.double())
        regularizer(found.values(), policy.seen_by_regularizer).weight.backward()
        for site in found.values():
            if regularizer.acts_on(site):
                penalty = [regularizer.site_penalty(site, site.alpha.detach() + d).item() for d in (-1e-6, 1e-6)]
                assert site.alpha.grad.item() == pytest.approx((penalty[1] - penalty[0]) / 2e-6, rel=1e-6)


def test_alphas_have_their_own_learning_rate_and_no_weight_decay(quantized):
    policy, found = AlphaPolicy("learnable", "learnable", lr_scale=0.1), sites(quantized)
    make = partial(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=1e-2)
    weights, alphas = policy.optimizer(make, quantized, found.values()).param_groups
    assert (weights["lr"], weights["weight_decay"]) == (0.5, 1e-2)
    assert (alphas["lr"], alphas["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in alphas["params"]} == {id(s.alpha) for s in found.values()}
    assert len(weights["params"]) + len(alphas["params"]) == len(list(quantized.parameters()))


def lone_site(bits, size=20_000, seed=0):
    site = LSQ("weight", bits)
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.1
    site.start(v.abs().mean(), v, True)
    return site, v


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("target", [0.2, 0.8, 1.25, 3.0])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_stability_index_tells_who_runs_away(bits, target, momentum, nesterov):
    """SGD on alpha alone under the regularizer, weights and codes held: below 1 it settles, above it does not.

    lambda is chosen so that the index is `target`; the verdict is what really happens over 500 steps.
    """
    site, v = lone_site(bits)
    site.seen = Seen(v.shape, v, site.codes(v, site.alpha.detach()).to(torch.int16))
    policy, lr = AlphaPolicy("backprop", "learnable"), 0.01
    h = BinReg(1.0).curvature(site)
    limit = 2 * (1 + momentum) / (1 + 2 * momentum if nesterov else 1)
    regularizer = BinReg(target * limit / (lr * h))
    optimizer = torch.optim.SGD([site.alpha], lr=lr, momentum=momentum, nesterov=nesterov)
    optimizer.param_groups[0]["base_lr"] = lr
    assert policy.stability_index(site, regularizer, optimizer) == pytest.approx(target)
    with torch.no_grad():
        site.alpha *= 1.01  # off the minimum
    for _ in range(500):
        optimizer.zero_grad()
        (regularizer.lambdas["weight"] * regularizer.site_penalty(site, site.alpha)).backward()
        optimizer.step()
    residual = torch.autograd.grad(regularizer.site_penalty(site, site.alpha), site.alpha)[0].abs().item()
    assert (residual < 1e-3) == (target < 1) or not torch.isfinite(site.alpha)


def test_the_figures_of_the_verdict():
    """W4, lambda 1, lr .05, momentum .9: I = 9; W2: I = .16."""
    for bits, expected in ((4, 9.05), (2, 0.158)):
        site, v = lone_site(bits)
        site.seen = Seen(v.shape, v * 2, site.codes(v * 2, site.alpha.detach()).to(torch.int16))  # every bin in use
        optimizer = torch.optim.SGD([site.alpha], lr=0.05, momentum=0.9)
        optimizer.param_groups[0]["base_lr"] = 0.05
        index = AlphaPolicy("backprop", "backprop").stability_index(site, BinReg(1.0), optimizer)
        assert index == pytest.approx(expected, rel=5e-3)


def weights(model):
    """Regularized weight sites with their weights."""
    return [(layer.weight_quantizer, layer.weight.detach()) for layer in (model.conv2, model.conv3)]


def verdict(quantized, pictures, lambda_br, policy=None, make=OPTIMIZERS["momentum"]):
    policy, found = policy or AlphaPolicy("backprop", "learnable"), sites(quantized)
    with torch.no_grad(), recording(found.values()):
        quantized(pictures)
        policy.check_stability(found, BinReg(lambda_br), policy.optimizer(make, quantized, found.values()))


def test_a_runaway_is_refused_a_doubtful_one_warned_of(quantized, pictures, caplog):
    h = max(2 * sum(c * c for c in s.codes(w, s.alpha).unique().tolist()) for s, w in weights(quantized))
    limit = 2 * 1.9 / 2.8 / (0.05 * h)
    with caplog.at_level(logging.WARNING):
        verdict(quantized, pictures, 1.0)
        assert not caplog.messages
        verdict(quantized, pictures, 0.75 * limit)
        assert "stability index" in caplog.messages[-1]
        with pytest.raises(ValueError, match=r"stability index .* alpha_policy.force=true"):
            verdict(quantized, pictures, 50.0)
        verdict(quantized, pictures, 50.0, AlphaPolicy("backprop", "learnable", force=True))
        verdict(quantized, pictures, 50.0, AlphaPolicy("learnable", "backprop"))  # no lambda on activations
        verdict(quantized, pictures, 50.0, make=OPTIMIZERS["adam"])
        assert "SGD only" in caplog.messages[-1]


def test_the_guard_holds_alpha_and_counts(each_kernels, quantized):
    found = sites(quantized)
    guard = PositiveAlphas(found)
    guard.guard()
    assert set(guard.counts().values()) == {0}
    start = {n: s.alpha.item() for n, s in found.items()}
    with torch.no_grad():
        found["conv2.weight"].alpha.fill_(-3.0)
        found["fc.input"].alpha.zero_()
    guard.guard()
    guard.guard()
    assert {n for n, c in guard.counts().items() if c == 1} == {"conv2.weight", "fc.input"}
    assert all(s.alpha.item() > 0 for s in found.values())
    assert found["conv2.weight"].alpha.item() == pytest.approx(start["conv2.weight"] * 1e-3)
    assert found["conv3.weight"].alpha.item() == start["conv3.weight"]


def test_alpha_control_is_said():
    lines = AlphaPolicy("frozen", "backprop").describe(BinReg(1.0, 0.0), warmup_epochs=5).splitlines()
    assert lines[1].split() == ["weights", "frozen", "until", "epoch", "5", "no", "epoch", "6"]
    assert lines[2].split() == ["activations", "backprop", "yes", "no,", "lambda", "is", "0", "never"]


def test_force_must_be_true_or_false():
    with pytest.raises(ValueError, match="neither true nor false"):
        AlphaPolicy("backprop", "backprop", force="no")


@pytest.mark.parametrize("bad", [{"weight": "freeze"}, {"act": "none"}, {"lr_scale": 0}, {"lr_scale": -1}])
def test_bad_policies_are_refused(bad):
    with pytest.raises(ValueError, match="alpha_policy"):
        AlphaPolicy(**{"weight": "learnable", "act": "learnable"} | bad)
