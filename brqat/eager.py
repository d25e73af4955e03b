"""torch's optimizers without torch's compiler.

An optimizer of torch keeps parts of itself out of compiled code, and imports the compiler to say so: with sympy and
triton 900 modules, a second at the start of every run, and nothing here is compiled. While nobody has imported
torch._dynamo nothing can be compiling; until then the optimizers do without it what they do with it, and from then on
torch's own code runs.

It reaches into torch (2.14: _compile.py and optim/optimizer.py). A release that looks different is left as it is: its
start takes a second longer, and that is all.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch.optim import Optimizer

KEPT_OUT = "__dynamo_disable"  # where _compile.py keeps what it calls in a method's place


def spare_the_compiler() -> None:
    """Call before the first optimizer is made."""
    for method in vars(Optimizer).values():
        inner = getattr(method, "__wrapped__", None)
        if _is(method, "torch._compile") and not hasattr(inner, KEPT_OUT):
            setattr(inner, KEPT_OUT, _kept_out(inner))
    for kind in Optimizer.__subclasses__():
        if (step := vars(kind).get("step")) and _is(step, "torch.optim.optimizer", "_use_grad"):
            kind.step = _differentiable(step)


def _is(function: object, module: str, name: str | None = None) -> bool:
    """Whether functools.wraps made it look like another, by a function of that module."""
    code, inside = getattr(function, "__code__", None), getattr(function, "__globals__", {}).get("__name__")
    return hasattr(function, "__wrapped__") and inside == module and name in (None, code.co_name)


def _kept_out(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        setattr(method, KEPT_OUT, torch._dynamo.disable(method, True, wrapping=False))
        return getattr(method, KEPT_OUT)(*args, **kwargs)

    return call


def _differentiable(step: Callable) -> Callable:
    """step runs with gradients only for an optimizer that is differentiable itself."""

    @functools.wraps(step)
    def call(self, *args, **kwargs):
        if "torch._dynamo" in sys.modules:
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step.__wrapped__(self, *args, **kwargs)

    return call
