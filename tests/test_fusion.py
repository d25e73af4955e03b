"""Networks whose BatchNorm is moved into the quantized layers behind it, against themselves as they were."""

import contextlib
from copy import deepcopy

import pytest
import torch
from conftest import TinyNet, lsq_scheme
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from brqat import kernels
from brqat.alpha_policy import AlphaPolicy
from brqat.fusion import Deferred, DeferredNorm, fuse
from brqat.layers import QuantConv2d, calibrate, quantize, sites
from brqat.levels import LevelHistory, Oscillation
from brqat.model.activation import ClippedReLU
from brqat.model.from_torchvision import from_torchvision
from brqat.model.residual import Sum
from brqat.model.resnet18 import resnet18
from brqat.model.resnet_cifar import ResNetCIFAR
from brqat.model.small_cnn import SmallCNN
from brqat.quantizer.lsq import LSQ
from brqat.regularizer.binreg import BinReg
from brqat.step import Step

CPU = torch.device("cpu")
SHARED = {"num_classes": 10, "in_channels": 3, "clip_value": "none"}
NETWORKS = {
    "small_cnn": (lambda: SmallCNN(width=8, **SHARED), 16),
    "resnet20": (lambda: ResNetCIFAR(depth=20, **SHARED), 16),
    "mobilenet_v2": (lambda: from_torchvision("mobilenet_v2", width_mult=0.25, **SHARED), 64),
}


def pictures(size, number=16, seed=0):
    images = torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return images.to(memory_format=torch.channels_last)


def twins(name, bits=2):
    """Quantized with and without fusion, calibrated; how many norms were moved; its pictures.

    Biases other than 0: the sums of codes that a convolution gives can hit their own mean, which normalised is 0, and
    whether that passes the ReLU's gradient is then up to a rounding.
    """
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    plain, images = make().to(memory_format=torch.channels_last), pictures(size)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.3, 0.5)
    quantize(plain, images, lsq_scheme(bits))
    fused = deepcopy(plain)
    moved = fuse(fused)
    for model in (plain, fused):
        calibrate(model, [images, pictures(size, seed=1)])
    return plain, fused, moved, images


def train(model, images, number, lr=1e-3):
    """Losses of a few steps with Bin Regularization of weights and activations. Long ones would lead a value across a
    tie of its own here and not there."""
    policy, found = AlphaPolicy("learnable", "learnable"), sites(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9)
    step = Step(model, found, BinReg(0.1, 0.01), policy, optimizer, contextlib.nullcontext)
    step.prepare(regularized=True)
    labels = torch.arange(len(images)) % 10
    torch.manual_seed(0)  # dropout
    return torch.stack([step(images, labels, {"weight": 0.1, "act": 0.01}) for _ in range(number)])


@pytest.mark.parametrize("name, number", [("small_cnn", 4), ("resnet20", 17), ("resnet18", 15), ("mobilenet_v2", 34)])
def test_how_many_norms_are_moved(name, number):
    """Two in each residual block but the last, which no convolution follows."""
    make, size = (lambda: resnet18(**SHARED), 16) if name == "resnet18" else NETWORKS[name]
    model = make()
    quantize(model, pictures(size, 2), lsq_scheme())
    assert fuse(model) == number
    assert sum(isinstance(m, DeferredNorm) for m in model.modules()) == number
    assert fuse(model) == 0  # and no more


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_dict_fits_both_ways(name):
    plain, fused, _, images = twins(name)
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert [key for key, _ in plain.named_parameters()] == [key for key, _ in fused.named_parameters()]
    for value in plain.state_dict().values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.mul_(1.25)
    for source, target in ((plain, fused), (fused, plain)):
        target.load_state_dict(source.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(target.eval()(images), source.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_calibration_and_plain_torch_are_the_same_to_the_last_bit(name):
    plain, fused, _, images = twins(name)
    for one, other in zip(sites(plain).values(), sites(fused).values(), strict=True):
        assert torch.equal(one.alpha, other.alpha) and one.grid == other.grid
    assert torch.equal(train(plain, images, 2), train(fused, images, 2))
    for key, value in plain.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, fused.state_dict()[key]), key


@pytest.mark.parametrize("name", NETWORKS)
def test_training_and_evaluation_are_those_of_plain_torch(native, name):
    plain, fused, _, images = twins(name)
    got = train(fused, images, 5)
    mine = fused.eval()(images)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), mine, rtol=1e-4, atol=1e-4)
    kernels.choose("torch", CPU)
    want = train(plain, images, 5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert want[-1, 0] != want[0, 0]
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():
        want = plain.eval()(images)
        kernels.choose("native", CPU)
        torch.testing.assert_close(fused.eval()(images), want, rtol=1e-4, atol=1e-4)


def quantized(model, images):
    quantize(model, images, lsq_scheme())
    return model


def test_a_relu_called_at_two_sites_stays(pictures):
    model = quantized(TinyNet(), pictures)
    assert fuse(model) == 0
    assert type(model.bn1) is nn.BatchNorm2d and type(model.relu) is nn.ReLU


class Reads(nn.Module):
    """conv, norm, relu, conv, where something else may read what lies between."""

    def __init__(self, also=None):
        super().__init__()
        self.first, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.also = also

    def forward(self, x):
        y = self.bn(self.first(x))
        r = self.relu(y)
        out = self.fc(self.conv(r).mean((2, 3)))
        return out if self.also is None else out + {"norm": y, "relu": r}[self.also].mean()


@pytest.mark.parametrize("also, number", [(None, 1), ("norm", 0), ("relu", 0)])
def test_what_is_read_twice_stays(also, number):
    assert fuse(quantized(Reads(also), pictures(8))) == number


@pytest.mark.parametrize("where", ["bn", "relu"])
@pytest.mark.parametrize("how", ["forward", "forward_pre", "full_backward"])
def test_what_has_a_hook_stays(where, how):
    model, seen = quantized(Reads(), pictures(8)), []
    getattr(model.get_submodule(where), f"register_{how}_hook")(lambda *_: seen.append(where))
    assert fuse(model) == 0
    calibrate(model, [pictures(8)])
    seen.clear()
    model(pictures(8)).sum().backward()
    assert seen == [where]


def test_norms_of_other_kinds_stay():
    class Own(nn.BatchNorm2d):
        pass

    for norm in (Own(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False)):
        model = Reads()
        model.bn = norm
        assert fuse(quantized(model, pictures(8))) == 0


def test_a_network_that_cannot_be_traced_stays():
    class Asks(Reads):
        def forward(self, x):
            return super().forward(x if x.mean() < 1e9 else -x)

    assert fuse(quantized(Asks(), pictures(8))) == 0


def test_a_copy_is_independent(native):
    _, fused, _, images = twins("small_cnn")
    copy = deepcopy(fused)
    before = {k: v.clone() for k, v in fused.state_dict().items() if isinstance(v, torch.Tensor)}
    kept = [m for m in copy.modules() if isinstance(m, DeferredNorm)]
    assert {id(m.before.norm) for m in copy.modules() if isinstance(m, QuantConv2d) and m.before} == set(map(id, kept))
    train(copy, images, 2)
    assert all(torch.equal(fused.state_dict()[key], value) for key, value in before.items())
    assert not torch.equal(copy.blocks[0].bn.weight, fused.blocks[0].bn.weight)


def test_a_norm_that_is_held_still(native):
    plain, fused, _, images = twins("small_cnn")
    for model in (plain, fused):
        model.blocks[0].bn.weight.requires_grad_(False)
        model.blocks[1].bn.requires_grad_(False)
        model.blocks[2].bn.eval()
    got = []
    for model, choice in ((plain, "torch"), (fused, "native")):
        kernels.choose(choice, CPU)
        model.zero_grad()
        model.blocks[2].bn.eval()
        nn.functional.cross_entropy(model(images), torch.arange(16) % 10).backward()
        got.append({name: p.grad for name, p in model.named_parameters()})
    assert got[1]["blocks.0.bn.weight"] is None and got[1]["blocks.1.bn.bias"] is None
    for name, grad in got[0].items():
        if grad is None:
            assert got[1][name] is None
        else:
            torch.testing.assert_close(got[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_level_metrics_see_v(native):
    rows = []
    for model, choice in zip(twins("small_cnn")[:2], ("torch", "native"), strict=True):
        kernels.choose(choice, CPU)
        found = sites(model)
        model.eval()
        rows.append(LevelHistory(found, Oscillation(found), 0).evaluate(model, [pictures(16)], 1)[0])
    assert len(rows[0]) == len(rows[1]) == 12
    for one, other in zip(*rows, strict=True):
        for key, value in one.items():
            numbers = isinstance(value, (int, float, list))
            assert value == (pytest.approx(other[key], rel=1e-4, abs=1e-6, nan_ok=True) if numbers else other[key]), key


def test_what_was_moved_lets_through():
    _, fused, moved, images = twins("small_cnn")
    assert sum(isinstance(m, Deferred) for m in fused.modules()) == moved
    assert fused.blocks[0].bn(images) is images and fused.blocks[0].relu(images) is images


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one_in_one_graph(native):
    """fullgraph: a break in the graph is an error. So is a second compilation, here for other lambdas."""
    _, fused, _, images = twins("small_cnn")
    labels, results = torch.arange(16) % 10, []
    start = deepcopy(fused.state_dict())
    for compiled in (False, True):
        policy, found = AlphaPolicy("backprop", "learnable"), sites(fused)
        step = Step(fused, found, BinReg(0.1, 0.01), policy, torch.optim.SGD(fused.parameters(), 0.1),
                    contextlib.nullcontext, compiled)  # fmt: skip
        step.prepare(regularized=True)
        for again, factors in enumerate((torch.tensor([0.1, 0.01]), torch.tensor([0.7, 0.3]))):
            fused.load_state_dict(start)
            fused.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=bool(again)):
                loss, figures = step.losses(images, labels, factors)
                loss.backward()
            grads = {name: p.grad.clone() for name, p in fused.named_parameters()}
            results.append((figures, grads, [fused.blocks[1].bn.running_var.clone()]))
    for eager, compiled in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    assert not torch.equal(results[0][0], results[1][0])


# ---- the end of a residual block


class Block(nn.Module):
    """conv -> norm -> Sum -> ReLU -> conv, whose shortcut is made by `shortcut`."""

    def __init__(self, shortcut, activation=None):
        super().__init__()
        self.conv1, self.norm, self.join = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), Sum()
        self.relu, self.conv2, self.fc = activation or nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.norm(self.conv1(x))
        r = self.relu(self.join(y, self.shortcut(y)))
        return self.fc((self.conv2(r) + r).mean((2, 3)))


def block_twins(shortcut, number, activation=None):
    torch.manual_seed(0)
    plain = Block(shortcut, activation).to(memory_format=torch.channels_last)
    nn.init.uniform_(plain.norm.bias, -0.3, 0.5)
    images = pictures(8)
    quantize(plain, images, lsq_scheme())
    fused = deepcopy(plain)
    assert fuse(fused) == number
    for model in (plain, fused):
        calibrate(model, [images])
    return plain, fused, images


def independent(y):
    """Of y's shape, but not made of it, so that y is read once."""
    return (
        torch.linspace(-1, 1, 16).view(1, 16, 1, 1).expand(16, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    )


def per_channel(y):
    """Broadcasts."""
    return torch.linspace(-1, 1, 16).view(1, 16, 1, 1)


def itself(y):
    return y


@pytest.mark.parametrize("shortcut, number", [(independent, 1), (per_channel, 1), (itself, 0)])
@pytest.mark.parametrize("ceiling", [None, 1.0])
def test_a_shortcut_is_added_as_plain_torch_adds_it(native, shortcut, number, ceiling):
    activation = None if ceiling is None else ClippedReLU(ceiling)
    plain, fused, images = block_twins(shortcut, number, activation)
    ours = train(fused, images, 4)
    kernels.choose("torch", torch.device("cpu"))
    torch.testing.assert_close(ours, train(plain, images, 4), rtol=1e-4, atol=1e-4)


def test_a_forward_that_broke_off_leaves_nothing_to_the_next(native):
    plain, fused, images = block_twins(independent, 1)
    hook = fused.conv2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fused(images)
    hook.remove()
    plain.load_state_dict(fused.state_dict())
    for model in (plain, fused):
        model.eval()
        model.conv2.input_quantizer.recording = True  # takes the plain path
    with torch.no_grad():
        assert torch.equal(fused(images.flip(0)), plain(images.flip(0)))
    assert fused.conv2.ready is None


class TestTheConvolutionBehindASum:
    """It keeps r for its backward, and not what r was quantized to."""

    def test_what_was_quantized_is_let_go_after_the_forward(self, native):
        _, fused, images = block_twins(independent, 1)
        stored = []
        fused.join.register_forward_hook(
            lambda *_: stored.append(StorageWeakRef(fused.conv2.ready[1].untyped_storage()))
        )
        out = fused(images)
        assert out.requires_grad and len(stored) == 1 and stored[0].expired()

    @pytest.mark.parametrize("what", ["alpha", "r"])
    def test_what_it_keeps_may_not_change_in_place(self, native, what):
        _, fused, images = block_twins(independent, 1)
        r = []
        fused.join.register_forward_hook(lambda _, args, out: r.append(out))
        loss = fused(images).square().sum()
        with torch.no_grad():
            (fused.conv2.input_quantizer.alpha if what == "alpha" else r[0]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, fused.conv2.weight)

    def test_neither_may_the_quantized_weight(self, native):
        _, fused, images = block_twins(independent, 1)
        weights = []
        fused.conv2.weight_quantizer.register_forward_hook(lambda _, args, out: weights.append(out))
        loss = fused(images).square().sum()
        weights[0].detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, fused.conv1.weight)

    def test_a_block_that_ends_in_the_sum_can_be_checkpointed(self, native):
        _, fused, images = block_twins(independent, 1)

        def block(x):
            y = fused.norm(fused.conv1(x))
            return fused.join(y, independent(y))

        found = []
        for call in (lambda x: block(x), lambda x: checkpoint(block, x, use_reentrant=False)):
            loss = fused.conv2(call(images)).square().sum()
            found.append(torch.autograd.grad(loss, [p for p in fused.parameters() if p is not None], allow_unused=True))
        assert sum(g is not None for g in found[0]) >= 6
        for one, other in zip(*found, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


def test_a_clipped_relu_is_taken_in(native):
    model = ResNetCIFAR(depth=20, **SHARED | {"clip_value": 1.0})
    quantize(model, pictures(16, 2), lsq_scheme())
    assert fuse(model) == 17


def test_an_activation_called_by_keyword_stays():
    class Keyword(nn.Sequential):
        def forward(self, x):
            return self[3](self[2](input=self[1](self[0](x))).mean((2, 3)))

    model = Keyword(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 10))
    quantize(model, pictures(8), lsq_scheme())
    assert fuse(model) == 0


class Squared(LSQ):
    def forward(self, v):
        return super().forward(v).square()


@pytest.mark.parametrize("way", ["hook", "subclass"])
def test_a_site_that_is_watched_or_another_is_called(native, way):
    _, fused, _, images = twins("small_cnn")
    layer = next(m for m in fused.modules() if isinstance(m, QuantConv2d) and m.before)
    called = []
    if way == "hook":
        layer.input_quantizer.register_forward_hook(lambda *_: called.append(1))
        fused(images)
        assert called
    else:
        single = fused(images)
        layer.input_quantizer.__class__ = Squared
        assert not torch.allclose(fused(images), single)


def test_a_second_derivative_is_refused(native):
    _, fused, _, images = twins("small_cnn")
    loss = fused(images).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, next(fused.parameters()), create_graph=True)
