"""BatchNorm, its activation and the quantizer behind it as one pass, where the network's graph allows.

    conv -> norm -> relu -> QuantConv2d                  becomes      conv -> QuantConv2d(before=(norm, relu))

where nothing else reads what norm and relu give, and at the end of a residual block, where others do,

    conv -> norm -> Sum(shortcut) -> relu -> QuantConv2d, ...    conv -> JoinedSum(shortcut) -> QuantConv2d, ...

The modules stay in the network under their names, so that a state_dict keeps its keys, but let everything through: the
quantized layer behind them does their work, in one pass where a kernel is at hand (kernels.norm_lsq) and one after the
other where it is not.
"""

import logging
import math

from torch import Tensor, fx, nn

from brqat.layers import QUANTIZED, Before, QuantConv2d
from brqat.model.activation import ClippedReLU
from brqat.model.residual import Sum

log = logging.getLogger(__name__)

ACTIVATIONS = (nn.ReLU, nn.ReLU6, ClippedReLU)


class DeferredNorm(nn.BatchNorm2d):
    """A BatchNorm that lets x through: its work is done by the layer behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Deferred(nn.Identity):
    """In the place of an activation whose work is done by the layer behind it."""


class JoinedSum(nn.Module):
    """A Sum whose layer normalises, adds, activates and quantizes at once, and gives what the others read."""

    def __init__(self, layer: QuantConv2d, norm_first: bool):
        super().__init__()
        self.layer = (layer,)  # in a tuple: the layer has its place in the network already
        self.norm_first = norm_first

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, shortcut = (a, b) if self.norm_first else (b, a)
        return self.layer[0].join(x, shortcut)


def fuse(model: nn.Module) -> int:
    """Moves every BatchNorm (with its activation) that feeds one QuantConv2d alone into that layer, in place.

    Returns how many. A network that torch.fx cannot follow is left as it is.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # control flow on values, unusual signatures: whatever forward does
        log.info("BatchNorm stays apart from quantization: this network's graph cannot be followed (%s)", error)
        return 0
    calls: dict[nn.Module, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            called = model.get_submodule(node.target)
            calls[called] = calls.get(called, 0) + 1
    fused = 0
    for node in graph.nodes:
        if _module(model, node, QuantConv2d) and node.args and _once(model, node, calls):
            fused += _take_in(model, node, calls)
    return fused


def _take_in(model: nn.Module, layer: fx.Node, calls: dict[nn.Module, int]) -> bool:
    activation, add, norm = None, None, layer.args[0]
    if _module(model, norm, ACTIVATIONS) and norm.args:
        activation, norm = norm, norm.args[0]
    if _module(model, norm, Sum) and activation is not None and len(set(norm.args)) == 2:
        add = norm
        norm = next((term for term in add.args if _foldable(model, term, calls)), None)
    if not _foldable(model, norm, calls):
        return False
    between = [node for node in (add, activation) if node is not None]
    if not all(_once(model, node, calls) for node in between) or any(
        len(n.users) > 1 for n in between[: -1 if add else None]
    ):
        return False
    batch_norm: nn.BatchNorm2d = model.get_submodule(norm.target)
    deferred = DeferredNorm(batch_norm.num_features, batch_norm.eps, batch_norm.momentum, device="meta")
    for key, value in (*batch_norm.named_parameters(), *batch_norm.named_buffers()):
        setattr(deferred, key, value)
    deferred.train(batch_norm.training)
    model.set_submodule(norm.target, deferred)
    act = None
    if activation is not None:
        act = model.get_submodule(activation.target)
        model.set_submodule(activation.target, Deferred())
    low, high = (-math.inf, math.inf) if act is None else (0.0, getattr(act, "max_val", math.inf))
    quantized = model.get_submodule(layer.target)
    quantized.before = Before(deferred, act, low, high, joins=add is not None)
    if add is not None:
        model.set_submodule(add.target, JoinedSum(quantized, norm_first=add.args[0] is norm))
    return True


def _foldable(model: nn.Module, node, calls: dict[nn.Module, int]) -> bool:
    """A BatchNorm of the plain kind, called once and read by one node."""
    if not _module(model, node, nn.BatchNorm2d) or not _once(model, node, calls) or len(node.users) > 1:
        return False
    norm = model.get_submodule(node.target)
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats


def _module(model: nn.Module, node, kinds) -> bool:
    return (
        isinstance(node, fx.Node) and node.op == "call_module" and isinstance(model.get_submodule(node.target), kinds)
    )


def _once(model: nn.Module, node: fx.Node, calls: dict[nn.Module, int]) -> bool:
    """Called once in a forward, known by one name, and without hooks, which would see another value."""
    module = model.get_submodule(node.target)
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return calls[module] == 1 and len(names) == 1 and not any(hooks)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*QUANTIZED, Sum, ClippedReLU)) or super().is_leaf_module(module, name)
