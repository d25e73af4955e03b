"""What quantize and calibrate do to networks, against the float network and against values caught by hooks."""

import logging
import math
from collections import Counter
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TinyNet, lsq_scheme
from torch import nn
from torchvision.models import resnet18

from brqat.layers import QUANTIZED, LayerCost, Makers, QuantLinear, Scheme, calibrate, quantize, sites
from brqat.quantizer.base import Quantizer
from brqat.quantizer.lsq import LSQ

WEIGHT, ACT = partial(LSQ, kind="weight", bits=2), partial(LSQ, kind="act", bits=2)


def numpy_fake_quantize(v, alpha, qn, qp):
    """Eq. 1 and 2 in numpy, float32 like the network."""
    v, alpha = v.detach().numpy(), alpha.detach().numpy()
    return torch.from_numpy(np.round(np.clip(v / alpha, qn, qp)) * alpha)


def quantized_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QUANTIZED)}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model, pictures = resnet18(num_classes=10), noise(4, 3, 32, 32)
    float_keys = list(model.state_dict())
    costs = quantize(model, pictures, lsq_scheme())
    calibrate(model, [pictures])
    return model.eval(), pictures, float_keys, costs


def test_resnet18_has_21_layers_and_42_sites_of_their_own(resnet):
    model, _, _, costs = resnet
    found = sites(model)
    assert len(quantized_layers(model)) == len(costs) == 21
    assert len(found) == len({id(site) for site in found.values()}) == 42
    assert Counter(site.kind for site in found.values()) == {"weight": 21, "act": 21}
    assert all(name.endswith({"weight": ".weight", "act": ".input"}[site.kind]) for name, site in found.items())
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())


def test_resnet18_every_site_runs_once_a_forward_on_its_layers_own_input(resnet):
    model, pictures, _, _ = resnet
    calls, fed, given = Counter(), {}, {}
    hooks = []
    for name, site in sites(model).items():

        def at_site(_, args, name=name):
            calls[name] += 1
            fed[name] = args[0]

        hooks.append(site.register_forward_pre_hook(at_site))
    for name, layer in quantized_layers(model).items():

        def at_layer(layer, args, name=name):
            given[f"{name}.input"], given[f"{name}.weight"] = args[0].clone(), layer.weight

        hooks.append(layer.register_forward_pre_hook(at_layer))
    try:
        with torch.no_grad():
            model(pictures)
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == dict.fromkeys(sites(model), 1)
    assert fed.keys() == given.keys()
    assert all(torch.equal(fed[name], given[name]) for name in fed)


def test_resnet18_first_and_last_layer_have_8_bits_and_are_exempt(resnet):
    model, _, _, costs = resnet
    ends = {"conv1.weight", "conv1.input", "fc.weight", "fc.input"}
    for name, site in sites(model).items():
        assert (site.bits, site.exempt) == ((8, True) if name in ends else (2, False)), name
    assert [(c.weight_bits, c.act_bits) for c in costs] == [(8, 8)] + [(2, 2)] * 19 + [(8, 8)]


def test_resnet18_keeps_every_key_of_a_float_checkpoint(resnet):
    model, _, float_keys, _ = resnet
    keys = list(model.state_dict())
    assert [key for key in keys if "_quantizer." not in key] == float_keys
    assert len(keys) > len(float_keys)


def test_without_outer_all_layers_have_the_same_bits_and_none_is_exempt(pictures):
    model = TinyNet()
    costs = quantize(model, pictures, lsq_scheme(bits=3, first_last=None))
    assert {(s.bits, s.exempt) for s in sites(model).values()} == {(3, False)}
    assert [(c.weight_bits, c.act_bits) for c in costs] == [(3, 3)] * 4


def test_costs_are_in_the_order_of_running_not_of_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.third, self.second, self.first = nn.Linear(7, 2), nn.Linear(5, 7), nn.Linear(3, 5)

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    model = Backwards()
    costs = quantize(model, noise(2, 3), lsq_scheme())
    assert [c.weights for c in costs] == [15, 35, 14]
    assert [model.first.weight_quantizer.bits, model.second.weight_quantizer.bits] == [8, 2]
    assert model.third.input_quantizer.exempt and not model.second.input_quantizer.exempt


@pytest.mark.parametrize("training", [True, False])
def test_both_sides_float_give_the_float_networks_output_to_the_bit(pictures, training):
    model = TinyNet().train(training)
    twin = deepcopy(model)
    costs = quantize(model, pictures, Scheme(Makers(None, None)))
    assert len(quantized_layers(model)) == 4 and not sites(model)
    assert {(c.weight_bits, c.act_bits) for c in costs} == {(32, 32)}
    assert torch.equal(model(pictures), twin(pictures))


def test_weights_float_quantizes_inputs_only(pictures):
    model = TinyNet().eval()
    quantize(model, pictures, Scheme(Makers(None, ACT)))
    calibrate(model, [pictures])
    assert list(sites(model)) == [f"{name}.input" for name in ("conv1", "conv2", "conv3", "fc")]
    layer, x = model.conv1, noise(2, 1, 6, 6, seed=1)
    site = layer.input_quantizer
    expected = nn.functional.conv2d(numpy_fake_quantize(x, site.alpha, -2, 1), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    assert not torch.allclose(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-3)


def test_inputs_float_quantizes_weights_only_and_needs_no_calibration(pictures):
    model = TinyNet().eval()
    twin = deepcopy(model)
    quantize(model, pictures, Scheme(Makers(WEIGHT, None)))
    assert list(sites(model)) == [f"{name}.weight" for name in ("conv1", "conv2", "conv3", "fc")]
    with torch.no_grad():
        for name in ("conv1", "conv2", "conv3", "fc"):
            weight = twin.get_submodule(name).weight
            alpha = torch.tensor(2 * np.abs(weight.double().numpy()).mean(), dtype=torch.float32)  # qp is 1
            weight.copy_(numpy_fake_quantize(weight, alpha, -2, 1))
        torch.testing.assert_close(model(pictures), twin(pictures))


def test_the_layers_keep_the_very_parameters(pictures):
    """An optimizer made before keeps its hold."""
    model = TinyNet()
    before = dict(model.named_parameters())
    quantize(model, pictures, lsq_scheme())
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_per_channel_start_is_lsqs_in_each_channel(pictures):
    model = TinyNet()
    quantize(model, pictures, lsq_scheme(bits=3, first_last=None, per_channel=True))
    for layer in (model.conv1, model.conv2, model.conv3, model.fc):
        weight, alpha = layer.weight, layer.weight_quantizer.alpha
        assert alpha.shape == (weight.shape[0], *[1] * (weight.dim() - 1))
        expected = [2 * np.abs(row).mean() / math.sqrt(3) for row in weight.detach().double().numpy()]
        np.testing.assert_allclose(alpha.flatten().tolist(), expected, rtol=1e-6)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.shared(self.shared(self.stem(x)).relu())


def test_a_layer_that_runs_twice_is_refused_by_name_and_the_model_is_left_alone():
    model = Twice()
    with pytest.raises(ValueError, match="shared runs more than once"):
        quantize(model, noise(2, 4), lsq_scheme())
    assert type(model.shared) is nn.Linear and type(model.stem) is nn.Linear
    assert not model.shared._forward_hooks


def test_a_layer_that_never_runs_stays_float_and_is_logged(pictures, caplog):
    model = TinyNet()
    model.auxiliary = nn.Linear(8, 3)
    with caplog.at_level(logging.WARNING, "brqat.layers"):
        costs = quantize(model, pictures, lsq_scheme())
    assert type(model.auxiliary) is nn.Linear and len(costs) == 4
    assert [r.getMessage() for r in caplog.records] == ["left in float: auxiliary"]


def test_nothing_is_logged_where_everything_is_quantized(pictures, caplog):
    with caplog.at_level(logging.WARNING, "brqat.layers"):
        quantize(TinyNet(), pictures, lsq_scheme())
    assert not caplog.records


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def test_the_projections_inside_multiheadattention_stay_float_and_are_logged(caplog):
    model, x = Attention(), noise(2, 5, 4)
    with caplog.at_level(logging.WARNING, "brqat.layers"):
        quantize(model, x, lsq_scheme())
    assert isinstance(model.stem, QuantLinear) and isinstance(model.head, QuantLinear)
    assert not isinstance(model.attention.out_proj, QUANTIZED)
    (record,) = caplog.records
    named = record.getMessage().removeprefix("left in float: ").split(", ")
    assert sorted(named) == ["attention", "attention.out_proj"]
    calibrate(model, [x])
    assert model(x).shape == (2, 5, 2)


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 2, 3), nn.Linear(6, 2)])
def test_a_bare_layer_is_refused(layer):
    with pytest.raises(ValueError, match="bare layer"):
        quantize(layer, noise(2, 1, 6, 6), lsq_scheme())


def test_a_model_without_a_layer_to_quantize_is_refused():
    with pytest.raises(ValueError, match="nothing to quantize"):
        quantize(nn.Sequential(nn.BatchNorm2d(1), nn.ReLU()), noise(2, 1, 6, 6), lsq_scheme())


OPTIONS = [
    dict(stride=2, padding=1),
    dict(padding=2, padding_mode="circular"),
    dict(padding=1, padding_mode="reflect", stride=(1, 2)),
    dict(groups=2, padding=(0, 1)),
    dict(dilation=2, padding=2),
    dict(bias=False),
    dict(padding="same", dilation=2, groups=4, bias=False),
]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conv_options_reach_the_quantized_layer(options, per_channel):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, 3, **options)
    twin, x = deepcopy(conv), noise(3, 4, 9, 9)
    model = nn.Sequential(conv)
    quantize(model, x, lsq_scheme(bits=3, first_last=None, per_channel=per_channel))
    calibrate(model, [x])
    found = sites(model)
    with torch.no_grad():
        twin.weight.copy_(numpy_fake_quantize(twin.weight, found["0.weight"].alpha, -4, 3))
        expected = twin(numpy_fake_quantize(x, found["0.input"].alpha, -4, 3))
        torch.testing.assert_close(model(x), expected)
    assert (model[0].bias is None) == (options.get("bias") is False)


def inputs_by_hand(model, batches):
    """What each layer sees over all batches: weights rounded, inputs not, BatchNorm by the batch; float64."""
    twin = deepcopy(model)
    caught = {}
    for name, layer in quantized_layers(twin).items():
        alpha, grid = layer.weight_quantizer.alpha, layer.weight_quantizer.grid
        with torch.no_grad():
            layer.weight.copy_(numpy_fake_quantize(layer.weight, alpha, *grid))
        layer.weight_quantizer = layer.input_quantizer = nn.Identity()
        caught[name] = []
        layer.register_forward_pre_hook(lambda _, args, name=name: caught[name].append(args[0].double().numpy()))
    twin.train()
    with torch.no_grad():
        for images in batches:
            twin(images)
    return {name: np.concatenate([v.ravel() for v in values]) for name, values in caught.items()}


def test_calibrate_starts_alpha_from_the_mean_over_all_batches(pictures):
    torch.manual_seed(0)
    model = TinyNet()
    model.bn1.running_mean.fill_(50.0)  # statistics that would ruin what comes behind, were they used
    quantize(model, pictures, lsq_scheme())
    batches = [pictures, 3 * pictures[:5], 0.2 * pictures + 1]  # of unequal size: no mean of means
    expected = inputs_by_hand(model, batches)
    calibrate(model, iter(batches))
    for name, v in expected.items():
        site = model.get_submodule(name).input_quantizer
        qp = 2 ** (site.bits - 1) - 1 if (v < 0).any() else 2**site.bits - 1
        assert site.grid.qp == qp
        assert site.alpha.item() == pytest.approx(2 * np.abs(v).mean() / math.sqrt(qp), rel=1e-5), name
        assert site.alpha.requires_grad


def test_calibrate_takes_the_signed_grid_where_any_batch_has_a_negative_value():
    positive = noise(4, 5).abs()
    for batches, grid in (
        ([positive, positive], (0, 3)),
        ([positive, -0.01 * positive, positive], (-2, 1)),
        ([torch.where(torch.arange(20).view(4, 5) == 7, -1e-6, positive), positive], (-2, 1)),
    ):
        model = nn.Sequential(nn.Linear(5, 3))
        quantize(model, positive, lsq_scheme(first_last=None))
        calibrate(model, batches)
        assert sites(model)["0.input"].grid == grid


@pytest.mark.parametrize("training", [True, False])
def test_quantize_and_calibrate_leave_running_statistics_and_training_mode_alone(pictures, training):
    model = TinyNet()
    model(pictures)  # statistics that are not the initial ones
    model.train(training)
    before = {key: buffer.clone() for key, buffer in model.bn1.named_buffers()}
    quantize(model, pictures, lsq_scheme())
    calibrate(model, [pictures, pictures + 1])
    assert all(torch.equal(before[key], buffer) for key, buffer in model.bn1.named_buffers())
    assert {m.training for m in model.modules() if not isinstance(m, Quantizer)} == {training}


def test_calibrate_refuses_inputs_that_are_all_zero_and_names_the_site(pictures):
    model = TinyNet()
    with torch.no_grad():
        model.conv2.weight.abs_().neg_()  # no positive value passes the ReLU behind
        model.conv2.bias.fill_(-1.0)
    quantize(model, pictures, lsq_scheme())
    with pytest.raises(ValueError, match=r"conv3\.input.*zero"):
        calibrate(model, [pictures])


def test_quantize_refuses_weights_that_are_all_zero_and_names_the_site(pictures):
    model = TinyNet()
    nn.init.zeros_(model.conv3.weight)
    with pytest.raises(ValueError, match=r"conv3\.weight.*zero"):
        quantize(model, pictures, lsq_scheme())


def test_calibrate_without_a_batch_is_refused(pictures):
    model = TinyNet()
    quantize(model, pictures, lsq_scheme())
    with pytest.raises(ValueError, match="conv1"):
        calibrate(model, [])
    assert isinstance(model.conv1.input_quantizer, LSQ)


def test_a_forward_before_calibrate_raises(pictures):
    model = TinyNet()
    quantize(model, pictures, lsq_scheme())
    with pytest.raises(RuntimeError, match="calibrate"):
        model(pictures)


def test_macs_and_bops_equal_a_count_of_every_product():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(96, 5))
    conv, linear = quantize(model, noise(3, 4, 8, 8), lsq_scheme(bits=2, first_last=None))
    products = 0
    for _row in range(0, 8, 2):
        for _column in range(0, 8, 2):
            for _out in range(6):
                for _in in range(4 // 2):
                    products += 3 * 3
    assert conv == LayerCost(weights=6 * 2 * 9, macs=products, weight_bits=2, act_bits=2)
    assert linear == LayerCost(weights=480, macs=480, weight_bits=2, act_bits=2)
    assert conv.bops == products * 4 and linear._replace(weight_bits=8, act_bits=4).bops == 480 * 32


def test_macs_of_a_linear_layer_count_every_token():
    model = nn.Sequential(nn.Linear(3, 7))
    (cost,) = quantize(model, noise(2, 5, 3), lsq_scheme())
    assert cost.macs == 5 * 3 * 7 and cost.weights == 21


def test_one_layer_under_two_names_is_swapped_under_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a
            self.h = nn.Linear(4, 2)

        def forward(self, x):
            return self.h(self.b(x))

    model = Twice()
    quantize(model, torch.randn(3, 4), lsq_scheme())
    assert model.a is model.b and isinstance(model.b, QuantLinear)
    calibrate(model, [torch.randn(3, 4)])
