"""The Triton kernels against the plain formulas, lsq and bin_table, forward and backward.

Without a GPU the kernels run in Triton's interpreter. Triton looks at TRITON_INTERPRET while it is imported, and
torch or another test may have imported it already: so this file is also a program, which a test starts with the
variable set. `TRITON_INTERPRET=1 python tests/test_triton.py` names the cases that fail.

What is held:
    v_hat, codes, count, dv     every element the same as the plain float32 formula, whatever the device: the kernels
                                round where it rounds. In 16 bits, that result rounded once.
    mse, dalpha                 sums in another order than the reference, which runs in float64. Each term and each
                                block's sum carries float32 roundings of 2^-24 of its operands: three or four in
                                a term, some 25 in a sum (16 in a row per thread, then a tree). They do not all
                                point one way; the bound allows 8.
"""

import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from lsq_cases import GRIDS, SCALE, cases, check, check_expanded_gradient, check_nan, check_repeats, same

from brqat.grid import uniform_grid
from brqat.kernels import Bins

triton = pytest.importorskip("triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(), (1,), (7,), (1023,), (1025,), (8200,), (5, 1), (1, 9), (3, 300), (2, 4099), (4, 6, 5, 5), (6, 3, 3, 3),
          (2, 5, 1, 1), (4, 1, 3, 3), (0,), (4, 0), (0, 3)]  # fmt: skip
SPECIALS = ["none", "nan", "inf", "edges", "ends"]


def check_compiled(device: str, fused, backend: str) -> None:
    """One graph, and the results of the same call outside of it to the last bit."""
    grid = uniform_grid(2, True)

    def loss(v, alpha, alpha_br, bins):
        v_hat, codes, count, mse = fused(v * 1.0, alpha, alpha_br, grid, SCALE, True, bins)
        total = v_hat.float().square().sum()
        return (total if mse is None else total + mse.sum()), codes, count

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    w = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)).to(device)
    for v, shape, bins, detached in (
        (w, (), Bins(False, False), False),
        (w.to(memory_format=torch.channels_last), (4, 1, 1, 1), Bins(True, True), True),
        (w.bfloat16(), (), None, True),
    ):
        results = []
        for call in (loss, compiled):
            x, alpha = v.clone().requires_grad_(), torch.full(shape, 0.3, device=device, requires_grad=True)
            total, codes, count = call(x, alpha, alpha.detach() if detached else alpha, bins)
            total.backward()
            results.append([codes, x.grad, alpha.grad] + ([] if count is None else [count]))
        for one, other in zip(*results, strict=True):
            assert one.stride() == other.stride()
            same(one, other, "compiled")


def run_all(device: str, number: int) -> list[str]:
    """What went wrong, one text per case."""
    from brqat.kernels.triton import lsq as fused

    drawn = cases(number, SHAPES, GRIDS, [torch.float32, torch.float32, torch.bfloat16, torch.float16], SPECIALS)
    todo = [(case, lambda c=case, s=seed: check(c, s, device, fused, 8, True)) for seed, case in enumerate(drawn)]
    todo.append(("nan", lambda: check_nan(device, fused)))
    todo.append(("repeats", lambda: check_repeats(device, fused)))
    todo.append(("expanded gradient", lambda: check_expanded_gradient(device, fused)))
    if device == "cpu":  # Inductor has a test of its own, on a GPU
        todo.append(("compiled", lambda: check_compiled(device, fused, "aot_eager")))
    wrong = []
    for name, call in todo:
        try:
            call()
        except Exception:
            wrong.append(f"{name}\n{traceback.format_exc(limit=-3)}")
    return wrong


@pytest.mark.slow
def test_interpreted_kernels_equal_the_plain_formulas():
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu_and_round_as_written(dtype):
    """The interpreter accepts what the compiler would not. No division but the exact one, and nothing fused."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from brqat.kernels import triton as kernels

    v, f, constant = f"*{dtype}", "*fp32", "constexpr"
    settings = {"PER_CHANNEL": True, "QN": -2, "QP": 1, "IN_STEPS": True, "DROP_CLIPPED": True, "BLOCK": 256}
    forward = {"v_ptr": v, "alpha_ptr": f, "v_hat_ptr": v, "codes_ptr": "*i16", "counts_ptr": "*i32", "totals_ptr": f}
    backward = {"v_ptr": v, "alpha_ptr": f, "grad_ptr": v, "lookup_ptr": f, "grad_v_ptr": v, "sums_ptr": f}
    backward["sums_br_ptr"] = f
    for kernel, pointers in ((kernels._forward_kernel, forward), (kernels._backward_kernel, backward)):
        signature = pointers | {"row": "i32", "per_row": "i32"} | dict.fromkeys(settings, constant)
        source = ASTSource(fn=kernel, signature=signature, constexprs=settings)
        options = {"num_warps": 2, "enable_fp_fusion": False}
        ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
        assert set(re.findall(r"\bdiv\.\S+f32", ptx)) == {"div.rn.f32"}
        assert not re.search(r"\bfma\.", ptx)


@pytest.mark.gpu
@needs_cuda
def test_kernels_on_cuda_equal_the_plain_formulas():
    wrong = run_all("cuda", 150)
    assert not wrong, "\n".join(wrong)


@pytest.mark.gpu
@needs_cuda
def test_compiled_on_cuda_is_one_graph_with_the_same_results():
    from brqat.kernels.triton import lsq as fused

    check_compiled("cuda", fused, "inductor")


if __name__ == "__main__":
    failed = run_all("cpu", 56)
    print(*failed, sep="\n")
    sys.exit(bool(failed))
