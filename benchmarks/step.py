"""A training step of brqat beside the same step in float and in other libraries.

    python benchmarks/step.py --model resnet20 [--batch 128] [--threads 2] [--rounds 15] [--compile] [--json]

A step is all that a run does for one batch: forward, cross-entropy, penalties, backward, SGD, for brqat the guard of the
alphas and the oscillation of the weights too (brqat.step.Step). Pictures are random, 3 x 32 x 32, channels_last. First
and last layers are 8 bits wide, the others 2. Rounds are interleaved: each times every row once, one after the other in
an order that turns, and a ratio is taken within its round. --json: the ratios to `float` with median, low and high
(the 10th and 90th percentile of the rounds), milliseconds, and the machine.

Rows of Brevitas and torchao are there where these are installed (pip install brevitas torchao), or --no-peers leaves
them out. --compile adds torch.compile's rows, for which the first round takes minutes.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from machine import line, machine
from torch import Tensor, nn

from brqat import kernels
from brqat.alpha_policy import AlphaPolicy
from brqat.fusion import fuse
from brqat.layers import Makers, QuantConv2d, QuantLinear, Scheme, calibrate, quantize, sites
from brqat.model.from_torchvision import from_torchvision
from brqat.model.resnet18 import resnet18
from brqat.model.resnet_cifar import ResNetCIFAR
from brqat.quantizer.lsq import LSQ
from brqat.regularizer.binreg import BinReg
from brqat.regularizer.none import NoRegularizer
from brqat.step import Step

BATCHES = {"resnet20": 128, "resnet18": 32, "mobilenet_v2": 64}
FLOAT, LSQ_ROW, BR_ROW = "float", "brqat W2A2", "brqat W2A2 BR weights+activations"
PLAIN, BUILT_IN, BREVITAS, TORCHAO = (
    "brqat W2A2 BR, kernels=torch",
    "torch learnable fake-quantize W2A2",
    "Brevitas W2A2",
    "torchao pt2e W2A2",
)
FLOAT_COMPILED, BR_COMPILED = "float, compiled", "brqat W2A2 BR, compiled"

Batch = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor], object]


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    batch = given.batch or BATCHES[given.model]
    times = measured(rows(given, batch), a_batch(batch), given.rounds, given.steps)
    found = {
        "model": given.model,
        "batch": batch,
        "ratio": {name: spread([a / b for a, b in zip(of, times[FLOAT], strict=True)]) for name, of in times.items()},
        "milliseconds": {name: 1e3 * statistics.median(of) for name, of in times.items()},
        "of_br": spread([a / b for a, b in zip(times[BR_ROW], times[LSQ_ROW], strict=True)]),
        "machine": machine(),
    }
    if given.compile:
        of_float = zip(times[BR_COMPILED], times[FLOAT_COMPILED], strict=True)
        found["compiled_of_compiled_float"] = spread([a / b for a, b in of_float])
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
    images = a_batch(batch)[0]
    found = {
        FLOAT: brqat_step(given.model, images, None, "native"),
        LSQ_ROW: brqat_step(given.model, images, NoRegularizer(), "native"),
        BR_ROW: brqat_step(given.model, images, BinReg(1.0, 1.0), "native"),
    }
    if given.compile:
        found[FLOAT_COMPILED] = brqat_step(given.model, images, None, "native", compiled=True)
        found[BR_COMPILED] = brqat_step(given.model, images, BinReg(1.0, 1.0), "native", compiled=True)
    if not given.no_peers:
        found[PLAIN] = brqat_step(given.model, images, BinReg(1.0, 1.0), "torch")
        found[BUILT_IN] = plain_step(with_layers(given.model, images, built_in))
        if importlib.util.find_spec("brevitas"):
            found[BREVITAS] = plain_step(with_layers(given.model, images, brevitas))
        if importlib.util.find_spec("torchao"):
            found[TORCHAO] = plain_step(torchao(network(given.model), images))
    return found


def measured(rows: dict[str, Run], batch: Batch, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of each row in each round."""
    for run in rows.values():
        for _ in range(3):
            run(*batch)
    names, times = list(rows), {name: [] for name in rows}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            rows[name](*batch)  # not timed: it fetches the row's weights back into the caches
            started = time.perf_counter()
            for _ in range(steps):
                rows[name](*batch)
            times[name].append((time.perf_counter() - started) / steps)
    return times


def spread(values: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"median": statistics.median(values), "low": tenths[0], "high": tenths[-1]}


def table(found: dict) -> str:
    lines = [
        f"{found['model']}, batch {found['batch']}",
        "| step | ms | of float (10% to 90% of rounds) |",
        "|---|---|---|",
    ]
    for name, of in found["ratio"].items():
        ratio = f"{of['median']:.3f} ({of['low']:.3f} to {of['high']:.3f})"
        lines.append(f"| {name} | {found['milliseconds'][name]:.1f} | {ratio} |")
    for key, words in (("of_br", "BR on top of LSQ"), ("compiled_of_compiled_float", "compiled, of compiled float")):
        if key in found:
            of = found[key]
            lines.append(f"\n{words}: {of['median']:.3f} ({of['low']:.3f} to {of['high']:.3f})")
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


def brqat_step(name: str, images: Tensor, regularizer, choice: str, compiled: bool = False) -> Run:
    """The step of a run: float without a regularizer, else W2A2."""
    model = network(name)
    kernels.choose(choice, images.device)
    if regularizer is not None:
        quantize(model, images[:2], scheme())
        if kernels.native_on(images.device):
            fuse(model)
        calibrate(model, [images])
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


def with_layers(name: str, images: Tensor, make: Callable[[nn.Module, int, bool], nn.Module]) -> nn.Module:
    """The network with each layer that brqat would quantize made anew by make(layer, bits, signed input)."""
    kernels.choose("torch", images.device)
    twin = network(name)
    quantize(twin, images[:2], scheme())
    calibrate(twin, [images])
    model = network(name)
    for key, layer in twin.named_modules():
        if isinstance(layer, QuantConv2d | QuantLinear):
            site = layer.input_quantizer
            model.set_submodule(key, make(model.get_submodule(key), site.bits, site.grid.qn < 0))
    model.to(memory_format=torch.channels_last).train()
    with torch.no_grad():
        model(images)  # where quantizers find their scales
    return model


class BuiltIn(nn.Module):
    """torch's own learnable fake-quantization of a layer's input and weight."""

    def __init__(self, layer: nn.Module, bits: int, signed: bool):
        super().__init__()
        self.layer, self.bits, self.signed = layer, bits, signed
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


built_in = BuiltIn


def brevitas(layer: nn.Module, bits: int, signed: bool) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    how = dict(
        bias=layer.bias is not None,
        weight_quant=Int8WeightPerTensorFloat,
        weight_bit_width=bits,
        input_quant=Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
        input_bit_width=bits,
    )
    if isinstance(layer, nn.Linear):
        return qnn.QuantLinear(layer.in_features, layer.out_features, **how)
    shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    return qnn.QuantConv2d(*shape, groups=layer.groups, **how)


def torchao(model: nn.Module, images: Tensor) -> nn.Module:
    """Its pt2e flow for training, with 2-bit ranges in its quantizer's own observers."""
    from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def spec(low: int, high: int, dtype: torch.dtype) -> QuantizationSpec:
        fake = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver)
        scheme = torch.per_tensor_symmetric if low < 0 else torch.per_tensor_affine
        return QuantizationSpec(
            dtype=dtype,
            quant_min=low,
            quant_max=high,
            qscheme=scheme,
            is_dynamic=False,
            observer_or_fake_quant_ctr=fake,
        )

    with contextlib.redirect_stderr(None):
        exported = torch.export.export(model.train(), (images,)).module()
    quantizer = x86.X86InductorQuantizer()
    config = QuantizationConfig(spec(0, 3, torch.uint8), None, spec(-2, 1, torch.int8), None, True)
    quantizer.set_global(config)
    prepared = prepare_qat_pt2e(exported, quantizer)
    from torchao.quantization.pt2e import move_exported_model_to_train

    return move_exported_model_to_train(prepared)


if __name__ == "__main__":
    main()
