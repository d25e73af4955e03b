"""A training step of brqat beside the same step in float and in other libraries.

    python benchmarks/step.py --model resnet20 [--batch 128] [--threads 2] [--rounds 15] [--compile] [--json]

A step is all that a run does for one batch: forward, cross-entropy, penalties, backward, SGD, for brqat the guard of
the alphas and the oscillation of the weights too (brqat.step.Step). Pictures are random, 3 x 32 x 32, channels_last.
First and last layers are 8 bits wide, the others 2. Rounds are interleaved: each times every row once, one after the
other in an order that turns, and a ratio is taken within its round. --json: the ratios to `float` with median, low and
high (the 10th and 90th percentile of the rounds), milliseconds, and the machine.

Rows of Brevitas and torchao are there where these are installed (pip install brevitas torchao), or --no-peers leaves
them out; one that does not work with the torch installed is left out, with the reason on stderr. --compile adds
torch.compile's rows, for which the first round takes minutes.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from machine import line, machine
from rounds import interleaved, markdown, quotients, said, spread
from torch import Tensor, nn

from brqat import kernels
from brqat.alpha_policy import AlphaPolicy
from brqat.fusion import fuse
from brqat.layers import Makers, QuantConv2d, QuantLinear, Scheme, calibrate, quantize, sites
from brqat.memory import keep_freed_memory
from brqat.model.from_torchvision import from_torchvision
from brqat.model.resnet18 import resnet18
from brqat.model.resnet_cifar import ResNetCIFAR
from brqat.quantizer.lsq import LSQ
from brqat.regularizer.binreg import BinReg
from brqat.regularizer.none import NoRegularizer
from brqat.step import Step

BATCHES = {"resnet20": 128, "resnet18": 32, "mobilenet_v2": 64}
FLOAT, LSQ_ROW, BR_ROW = "float", "brqat W2A2", "brqat W2A2 BR weights+activations"
PLAIN, BUILT_IN = "brqat W2A2 BR, kernels=torch", "torch learnable fake-quantize W2A2"
BREVITAS, TORCHAO = "Brevitas W2A2", "torchao pt2e W2A2"
PEERS = {BREVITAS: "brevitas", TORCHAO: "torchao"}
FLOAT_COMPILED, BR_COMPILED = "float, compiled", "brqat W2A2 BR, compiled"

Batch = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor], object]


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    keep_freed_memory()  # as a run does; every row has it
    batch = given.batch or BATCHES[given.model]
    times = measured(rows(given, batch), a_batch(batch), given.rounds, given.steps)
    found = {
        "model": given.model,
        "batch": batch,
        "ratio": {name: spread(quotients(of, times[FLOAT])) for name, of in times.items()},
        "milliseconds": {name: 1e3 * statistics.median(of) for name, of in times.items()},
        "of_br": spread(quotients(times[BR_ROW], times[LSQ_ROW])),
        "machine": machine(*PEERS.values()),
    }
    if given.compile:
        found["compiled_of_compiled_float"] = spread(quotients(times[BR_COMPILED], times[FLOAT_COMPILED]))
    print(json.dumps(found, indent=1) if given.json else table(found))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BATCHES, default="resnet20")
    parser.add_argument("--batch", type=int, help=f"pictures; if not given {BATCHES}")
    parser.add_argument("--threads", type=int, help="of torch; as many as it likes if not given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="of each row in a round")
    parser.add_argument("--compile", action="store_true", help="rows of torch.compile too")
    parser.add_argument("--no-peers", action="store_true", help="brqat and float alone")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser.parse_args(arguments)


def a_batch(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (size,), generator=generator)


def rows(given: argparse.Namespace, batch: int) -> dict[str, Run]:
    """Name -> a step. Every row has its own network, from the same start."""
    made = {}
    for name, make in makers(given.model, a_batch(batch)[0], given.compile, not given.no_peers).items():
        try:
            made[name] = make()
        except Exception as error:
            if name not in PEERS:
                raise
            print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return made


def makers(model: str, images: Tensor, compiled: bool = False, peers: bool = True) -> dict[str, Callable[[], Run]]:
    """Name -> what makes the row."""
    br = BinReg(1.0, 1.0)
    found = {
        FLOAT: lambda: brqat_step(model, images, None, "native"),
        LSQ_ROW: lambda: brqat_step(model, images, NoRegularizer(), "native"),
        BR_ROW: lambda: brqat_step(model, images, br, "native"),
    }
    if compiled:
        found[FLOAT_COMPILED] = lambda: brqat_step(model, images, None, "native", compiled=True)
        found[BR_COMPILED] = lambda: brqat_step(model, images, br, "native", compiled=True)
    if peers:
        found[PLAIN] = lambda: brqat_step(model, images, br, "torch")
        found[BUILT_IN] = lambda: plain_step(with_layers(model, images, BuiltIn))
        found[BREVITAS] = lambda: plain_step(with_layers(model, images, brevitas))
        found[TORCHAO] = lambda: plain_step(torchao(model, images))
    return {name: make for name, make in found.items() if name not in PEERS or importlib.util.find_spec(PEERS[name])}


def measured(rows: dict[str, Run], batch: Batch, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each row in each round."""
    for run in rows.values():
        for _ in range(3):
            run(*batch)
    return interleaved({name: partial(run, *batch) for name, run in rows.items()}, rounds, steps)


def table(found: dict) -> str:
    cells = [["step", "ms", "of float (10% to 90% of rounds)"]]
    cells += [[name, f"{found['milliseconds'][name]:.1f}", said(of)] for name, of in found["ratio"].items()]
    lines = [f"{found['model']}, batch {found['batch']}", "", markdown(cells)]
    for key, words in (("of_br", "BR on top of LSQ"), ("compiled_of_compiled_float", "compiled, of compiled float")):
        if key in found:
            lines.append(f"\n{words}: {said(found[key])}")
    return "\n".join([*lines, "", line(found["machine"])])


# ---- brqat


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    shape = {"num_classes": 10, "in_channels": 3, "clip_value": None}
    if name == "resnet20":
        model = ResNetCIFAR(depth=20, **shape)
    elif name == "resnet18":
        model = resnet18(**shape)
    else:
        model = from_torchvision(name, **shape)
    return model.to(memory_format=torch.channels_last)


def brqat_network(name: str, images: Tensor, quantized: bool, choice: str) -> nn.Module:
    """As a run has it when training begins."""
    model = network(name)
    kernels.choose(choice, images.device)
    if quantized:
        quantize(model, images[:2], scheme())
        if kernels.native_on(images.device):
            fuse(model)
        calibrate(model, [images])
    return model


def brqat_step(name: str, images: Tensor, regularizer, choice: str, compiled: bool = False) -> Run:
    """The step of a run: float without a regularizer, else W2A2."""
    model = brqat_network(name, images, regularizer is not None, choice)
    regularizer = regularizer or NoRegularizer()
    policy = AlphaPolicy("learnable", "learnable")
    found = sites(model)
    optimizer = policy.optimizer(
        partial(torch.optim.SGD, lr=1e-4, momentum=0.9, weight_decay=1e-4), model, found.values()
    )
    step = Step(model, found, regularizer, policy, optimizer, nullcontext, compiled)
    step.prepare(regularized=True)

    def run(images: Tensor, labels: Tensor) -> None:
        kernels.choose(choice, images.device)
        step(images, labels, {"weight": 1e-3, "act": 1e-3})

    return run


def scheme() -> Scheme:
    def makers(bits: int) -> Makers:
        return Makers(partial(LSQ, "weight", bits), partial(LSQ, "act", bits))

    return Scheme(makers(2), makers(8))


# ---- others


def plain_step(model: nn.Module) -> Run:
    """Forward, cross-entropy, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def run(images: Tensor, labels: Tensor) -> None:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def quantized_layers(name: str, images: Tensor) -> dict[str, tuple[int, bool]]:
    """The layers that brqat quantizes: their names -> bits, and whether their input is signed."""
    kernels.choose("torch", images.device)
    twin = network(name)
    quantize(twin, images[:2], scheme())
    calibrate(twin, [images])
    layers = {key: layer for key, layer in twin.named_modules() if isinstance(layer, QuantConv2d | QuantLinear)}
    return {key: (layer.input_quantizer.bits, layer.input_quantizer.grid.qn < 0) for key, layer in layers.items()}


def with_layers(name: str, images: Tensor, make: Callable[[nn.Module, int, bool], nn.Module]) -> nn.Module:
    """The network with each layer that brqat would quantize made anew by make(layer, bits, signed input)."""
    model = network(name)
    for key, (bits, signed) in quantized_layers(name, images).items():
        model.set_submodule(key, make(model.get_submodule(key), bits, signed))
    model.to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        model(images)  # where quantizers find their scales
    return model


class BuiltIn(nn.Module):
    """torch's own learnable fake-quantization of a layer's input and weight: LSQ in one operator, no penalty."""

    def __init__(self, layer: nn.Module, bits: int, signed: bool):
        super().__init__()
        self.layer, self.bits, self.signed = layer, bits, signed
        if isinstance(layer, nn.Conv2d):  # what a residual block asks of it
            self.out_channels, self.stride = layer.out_channels, layer.stride
        self.scale = nn.Parameter(torch.tensor([1.0 if bits == 2 else 0.05]))
        self.weight_scale = nn.Parameter(layer.weight.detach().abs().mean().view(1) * 2 ** (1 if bits == 2 else -5))
        self.register_buffer("zero", torch.zeros(1))

    def quantized(self, v: Tensor, scale: Tensor, signed: bool) -> Tensor:
        qn, qp = (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if signed else (0, 2**self.bits - 1)
        factor = 1 / (v[0].numel() * qp) ** 0.5
        return torch._fake_quantize_learnable_per_tensor_affine(v, scale, self.zero, qn, qp, factor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantized(x, self.scale, self.signed)
        weight = self.quantized(self.layer.weight, self.weight_scale, True)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, self.layer.bias)
        return nn.functional.linear(x, weight, self.layer.bias)


def brevitas(layer: nn.Module, bits: int, signed: bool) -> nn.Module:
    """A layer of Brevitas's with learned scales for input and weight, per tensor, all 2**bits levels: LSQ, no penalty.

    An input's scale is a percentile of its values for collect_stats_steps training steps, 300 unless told, and learned
    from there. One is enough here: collecting takes much longer than what a run does for the rest of its steps.
    """
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    how = {
        "bias": layer.bias is not None,
        "weight_quant": Int8WeightPerTensorFloat,
        "weight_bit_width": bits,
        "weight_narrow_range": False,
        "weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS,
        "input_quant": Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
        "input_bit_width": bits,
        "input_collect_stats_steps": 1,
    }
    if isinstance(layer, nn.Linear):
        return qnn.QuantLinear(layer.in_features, layer.out_features, **how)
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    return qnn.QuantConv2d(*shape, groups=layer.groups, **how)


def torchao(name: str, images: Tensor) -> nn.Module:
    """The network by torchao's pt2e flow for training, with its quantizer for x86.

    Its ranges are moving averages of minimum and maximum, not learned: less than LSQ. It folds each BatchNorm into its
    convolution's weight before that is quantized, and quantizes what residual sums add up: more than LSQ.
    """
    from torchao.quantization.pt2e import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        allow_exported_model_train_eval,
    )
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    def spec(low: int, high: int) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=torch.int8 if low < 0 else torch.uint8,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_tensor_symmetric if low < 0 else torch.per_tensor_affine,
            is_dynamic=False,
            observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
        )

    def config(bits: int) -> QuantizationConfig:
        weight = spec(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return QuantizationConfig(spec(0, 2**bits - 1), None, weight, None, is_qat=True)

    quantizer = X86InductorQuantizer().set_global(config(2))
    for key, (bits, _) in quantized_layers(name, images).items():
        if bits != 2:
            quantizer.set_module_name_qconfig(key, config(bits))
    exported = torch.export.export(network(name).train(), (images,)).module()
    prepared = prepare_qat_pt2e(exported, quantizer)
    allow_exported_model_train_eval(prepared)
    prepared.train()
    return prepared


if __name__ == "__main__":
    main()
