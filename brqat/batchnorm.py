"""BatchNorm's running statistics, set aside or re-estimated while the network is looked at.

Under low-bit training the running averages lag behind weights that oscillate between two levels, so a network is
evaluated with statistics re-estimated on training pictures (Nagel et al., "Overcoming Oscillations in
Quantization-Aware Training", ICML 2022, section 4.1).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm that keeps running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all running buffers, by state_dict key."""
    return {
        f"{name}.{key}".removeprefix("."): buffer.clone()
        for name, norm in norms(model).items()
        for key, buffer in norm.named_buffers(recurse=False)
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """At the end every module is in its mode again, with the running statistics it had."""
    modes = {module: module.training for module in model.modules()}
    kept = running_statistics(model)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        model.load_state_dict(kept, strict=False)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode but BatchNorm normalises by the batch; running buffers return at the end."""
    with unchanged(model):
        model.eval()
        for norm in norms(model).values():
            norm.train()
        yield


@contextmanager
def reestimated(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the model is in eval mode and its running statistics are the plain average over the batches.

    The statistics of the training run return at the end. Without a BatchNorm the batches are not read.
    """
    found = list(norms(model).values())
    with unchanged(model):
        model.eval()
        if found:
            _average(model, found, batches)
        yield


@torch.no_grad()
def _average(model: nn.Module, found: list[_BatchNorm], batches: Iterable[Tensor]) -> None:
    momenta = [norm.momentum for norm in found]
    try:
        for norm in found:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the cumulative average
            norm.train()
        for images in batches:
            model(images)
    finally:
        for norm, momentum in zip(found, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
