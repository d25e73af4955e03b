"""Quantized layers, and the calls that put them into a network and start them.

A quantized layer is the float layer plus two sites: its weight and its input. Each layer has its own input site, so
a ReLU module that a network calls twice (torchvision's BasicBlock does) still feeds two sites, and a float
checkpoint's keys stay as they are.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from brqat import kernels
from brqat.batchnorm import batch_statistics
from brqat.quantizer.base import Quantizer

log = logging.getLogger(__name__)

# Values kept per batch and site for the error-minimal start; over 16 batches a quarter of a million.
SAMPLE_PER_BATCH = 16_384

FLOAT_BITS = 32


class Before(NamedTuple):
    """What a layer does to its input before quantizing it, for modules of the network that it has taken over."""

    norm: nn.BatchNorm2d  # normalises here; where it stands in the network it lets everything through
    activation: nn.Module | None
    low: float  # the activation's bounds
    high: float
    joins: bool  # between the two a shortcut is added: QuantConv2d.join is called before the layer

    def __call__(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        y = nn.BatchNorm2d.forward(self.norm, x)
        if shortcut is not None:
            y = y + shortcut
        return y if self.activation is None else self.activation(y)

    def for_kernel(self) -> kernels.Norm:
        """Counts the batch, as BatchNorm does. momentum None means the average over all batches so far."""
        norm, momentum = self.norm, self.norm.momentum
        if norm.training:
            norm.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / norm.num_batches_tracked.item()
        running = norm.running_mean, norm.running_var
        return kernels.Norm(norm.weight, norm.bias, *running, momentum, norm.training, norm.eps, self.low, self.high)


class _Kept(NamedTuple):
    """What a convolution gets back in backward. Under hooks torch checks no versions: this does it."""

    make: Callable[[], Tensor]
    of: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def now(cls, make: Callable[[], Tensor], *of: Tensor) -> "_Kept":
        return cls(make, of, tuple(t._version for t in of))

    def value(self) -> Tensor:
        if tuple(t._version for t in self.of) != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                "input, weight or step size of a quantized convolution, between its forward and its backward"
            )
        return self.make()


class QuantConv2d(nn.Conv2d):
    """nn.Conv2d whose input and weight pass a quantizer (nn.Identity where they stay float)."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module
    before: Before | None = None
    ready: tuple[Tensor, Tensor] | None = None  # the input of the next forward, and that input quantized, from join

    def forward(self, x: Tensor) -> Tensor:
        (r, v_hat), self.ready = self.ready or (None, None), None
        weight = self.weight_quantizer(self.weight)
        if r is not x or r is None:
            return self._conv_forward(self._quantized(x), weight, self.bias)
        with self._kept_as(r, v_hat):
            return self._conv_forward(v_hat, weight, self.bias)

    def _kept_as(self, r: Tensor, v_hat: Tensor) -> AbstractContextManager:
        """Keeps nothing of v_hat for backward: there r, which the site itself keeps, is quantized once more."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return nullcontext()
        site, place, r = self.input_quantizer, v_hat.data_ptr(), r.detach()
        alpha = site.alpha.detach()
        quantize_again = partial(kernels.lsq_again, r, alpha, site.grid)

        def pack(t: Tensor) -> _Kept:
            return _Kept.now(quantize_again, r, alpha) if t.data_ptr() == place else _Kept.now(lambda: t, t)

        return torch.autograd.graph.saved_tensors_hooks(pack, _Kept.value)

    def _quantized(self, x: Tensor) -> Tensor:
        if self.before is None or self.before.joins:
            return self.input_quantizer(x)
        if (out := self._in_one_pass(x, None)) is not None:
            return out[0]
        return self.input_quantizer(self.before(x, None))

    def join(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """What the layer is about to read, activation(norm(x) + shortcut), which others read too."""
        self.ready = None  # what a forward that broke off may have left
        out = self._in_one_pass(x, shortcut) if shortcut.shape == x.shape and shortcut.dtype == x.dtype else None
        if out is None:
            return self.before(x, shortcut)
        v_hat, r = out
        self.ready = r, v_hat
        return r

    def _in_one_pass(self, x: Tensor, shortcut: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        if not isinstance(self.input_quantizer, Quantizer):
            return None
        return self.input_quantizer.after_norm(x, shortcut, self.before.norm.training, self.before.for_kernel)


class QuantLinear(nn.Linear):
    """nn.Linear whose input and weight pass a quantizer (nn.Identity where they stay float)."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


QUANTIZED = (QuantConv2d, QuantLinear)


class Makers(NamedTuple):
    """How a layer's two quantizers are made; None leaves that side float."""

    weight: Callable[[], Quantizer] | None
    act: Callable[[], Quantizer] | None


class Scheme(NamedTuple):
    """Which quantizers layers get: inner all of them; outer the first and last to run, None for the same."""

    inner: Makers
    outer: Makers | None = None

    @property
    def is_float(self) -> bool:
        return self.inner == Makers(None, None)

    @property
    def bits(self) -> dict[str, int]:
        """Widths of all layers but the first and last; 32 stands for float."""
        return {kind: make().bits if make else FLOAT_BITS for kind, make in self.inner._asdict().items()}

    @property
    def tag(self) -> str:
        """W2A2 and the like, weights first."""
        return "W{weight}A{act}".format(**self.bits)


def scheme(
    weight: partial,
    act: partial,
    first_last_weight: partial,
    first_last_act: partial,
    first_last_bits: int | str,
    **shared,
) -> Scheme:
    """The quantizer group: partial quantizers that carry their bits, where bits "float" leaves that side alone.

    first_last_bits "same" treats the first and the last layer like the others, and so does a network that is float
    elsewhere. shared are the keys that stand in the config for the partials to refer to.
    """
    unknown = set(shared) - {"bits", "per_channel", "start"}
    if unknown:
        raise TypeError(f"unexpected key {sorted(unknown)[0]!r}")
    inner = Makers(_maker("weight", weight), _maker("act", act))
    if first_last_bits == "same" or inner == Makers(None, None):
        return Scheme(inner)
    outer = Makers(_maker("first_last_weight", first_last_weight), _maker("first_last_act", first_last_act))
    return Scheme(inner, outer)


def _maker(key: str, make: partial) -> partial | None:
    """None for float; a width that cannot be fails here, before anything is trained."""
    if make.keywords["bits"] == "float":
        return None
    try:
        make()
    except ValueError as error:
        raise ValueError(f"quantizer.{key}: {error}") from error
    return make


class LayerCost(NamedTuple):
    """What one layer costs in a forward of one picture."""

    weights: int
    macs: int
    weight_bits: int  # 32 for float
    act_bits: int

    @property
    def bops(self) -> int:
        """Bit operations, macs * weight bits * activation bits (Baskin et al., UNIQ, 2018)."""
        return self.macs * self.weight_bits * self.act_bits


def quantize(model: nn.Module, example: Tensor, scheme: Scheme) -> list[LayerCost]:
    """Swaps every nn.Conv2d and nn.Linear of the model, in place, and starts the weight sites.

    example: a batch the model can run; one forward finds which layers run, in which order, and what they cost.
    The first and the last layer to run get scheme.outer. Activation sites still need `calibrate`.

    A layer that does not run (an auxiliary head) stays float, and so does a subclass of the two, such as the
    projection inside nn.MultiheadAttention, whose weight is used behind the layer's back: both are logged.
    Raises ValueError for a layer that runs twice in a forward, and for a model without any layer to quantize.
    """
    if type(model) in (nn.Conv2d, nn.Linear):
        raise ValueError("a bare layer has no parent to put its quantized twin into: wrap it in nn.Sequential.")
    found = {name: m for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
    macs = _order_and_macs(model, found, example)
    if not macs:
        raise ValueError("no nn.Conv2d or nn.Linear runs in this model: there is nothing to quantize.")
    names = list(macs)
    costs, swapped = [], {}
    for position, name in enumerate(names):
        at_the_end = position in (0, len(names) - 1)
        exempt = at_the_end and scheme.outer is not None
        makers = scheme.outer if exempt else scheme.inner
        layer = _quantized(found[name], makers)
        for site in (layer.weight_quantizer, layer.input_quantizer):
            if isinstance(site, Quantizer):
                site.exempt = exempt
        _start_weight(name, layer)
        swapped[found[name]] = layer
        costs.append(
            LayerCost(layer.weight.numel(), macs[name], _bits(layer.weight_quantizer), _bits(layer.input_quantizer))
        )
    for parent in list(model.modules()):
        for key, child in parent._modules.items():  # named_children() would pass over a second name for one layer
            if child in swapped:
                parent._modules[key] = swapped[child]
    left = [name for name in found if name not in macs] + [
        name
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.MultiheadAttention)) and type(m) not in QUANTIZED
    ]
    if left:
        log.warning("left in float: %s", ", ".join(dict.fromkeys(left)))
    return costs


def sites(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer by name, LAYER.weight and LAYER.input, in the order of the model's modules."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QUANTIZED):
            for side, site in (("weight", layer.weight_quantizer), ("input", layer.input_quantizer)):
                if isinstance(site, Quantizer):
                    found[f"{name}.{side}" if name else side] = site
    return found


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Gives every activation site its grid and its alpha from what flows through over several batches.

    Weights are quantized meanwhile and inputs are not. One batch is not enough: an LSQ start from a single one was
    seen 7.9 times off. A site that ever sees a negative value gets a signed grid.
    BatchNorm normalises by the batch here, so that a network that has not been trained is measured as its first
    training step will see it; running statistics are left alone.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QUANTIZED)}
    observed = {
        name: (layer.input_quantizer, _Observer())
        for name, layer in layers.items()
        if isinstance(layer.input_quantizer, Quantizer)
    }
    for name, (_, observer) in observed.items():
        layers[name].input_quantizer = observer
    try:
        with batch_statistics(model):
            for images in batches:
                model(images)
    finally:
        for name, (site, _) in observed.items():
            layers[name].input_quantizer = site
    for name, (site, observer) in observed.items():
        if observer.count == 0:
            raise ValueError(f"calibration never reached {name}: give it at least one batch of pictures.")
        try:
            site.start(observer.mean_abs(), observer.sample(), signed=bool(observer.least < 0))
        except ValueError as error:
            raise ValueError(f"{name}.input: {error}") from error


class _Observer(nn.Module):
    """Stands in for an input quantizer during calibration and lets everything through."""

    def __init__(self):
        super().__init__()
        self.total, self.count, self.least = 0.0, 0, 0.0
        self.kept: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, v: Tensor) -> Tensor:
        values = v.detach().float().flatten()
        self.total = self.total + values.abs().sum(dtype=torch.float64)
        self.least = torch.minimum(values.min(), torch.as_tensor(self.least, device=v.device))
        self.count += values.numel()
        picked = torch.randint(values.numel(), (min(SAMPLE_PER_BATCH, values.numel()),), generator=self.generator)
        self.kept.append(values[picked.to(v.device)])
        return v

    def mean_abs(self) -> Tensor:
        return (self.total / self.count).float()

    def sample(self) -> Tensor:
        return torch.cat(self.kept)


def _order_and_macs(model: nn.Module, layers: dict[str, nn.Module], example: Tensor) -> dict[str, int]:
    """Multiply-accumulates per picture of each layer that runs, in the order of running."""
    macs: dict[str, int] = {}
    twice = []

    def count(name):
        def hook(layer, _, output):
            if name in macs:
                twice.append(name)
            positions = output.numel() // output.shape[0] // layer.weight.shape[0]
            macs[name] = positions * layer.weight.numel()

        return hook

    hooks = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    if twice:
        raise ValueError(
            f"{twice[0]} runs more than once in a forward. brqat gives each layer one input site with one alpha, "
            "which cannot fit two different inputs: build the model with one module per call."
        )
    return macs


def _quantized(layer: nn.Module, makers: Makers) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        swapped = QuantConv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
    else:
        swapped = QuantLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    swapped.weight, swapped.bias = layer.weight, layer.bias
    swapped.train(layer.training)
    device = layer.weight.device
    swapped.weight_quantizer = makers.weight().to(device) if makers.weight else nn.Identity()
    swapped.input_quantizer = makers.act().to(device) if makers.act else nn.Identity()
    return swapped


def _start_weight(name: str, layer: nn.Module) -> None:
    site, weight = layer.weight_quantizer, layer.weight.detach()
    if not isinstance(site, Quantizer):
        return
    shape = (weight.shape[0], *[1] * (weight.dim() - 1)) if site.per_channel else ()
    size = weight.numel() // weight.shape[0] if site.per_channel else weight.numel()
    try:
        site.start(weight.abs().sum_to_size(shape) / size, weight, signed=True)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error


def _bits(site: nn.Module) -> int:
    return site.bits if isinstance(site, Quantizer) else FLOAT_BITS
