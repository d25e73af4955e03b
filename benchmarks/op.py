"""One fake-quantization forward and backward, with the regularizer's table and without, beside a ReLU's.

    python benchmarks/op.py [--threads 1 2] [--sizes 1e4 1e6 1e7] [--bits 1 2 4 8] [--rounds 9] [--json]

LSQ                  v_hat; gradients for v and alpha from one for v_hat
LSQ+BR               v_hat and the per-bin table; gradients for v and alpha from one for v_hat and one for mse
..., plain PyTorch   the same by the reference, quantizer/lsq.py and bins.py

A call is the forward, torch.autograd.backward and v.grad and alpha.grad set to None before it, of float32 v with one
alpha; a ReLU's is torch.relu and its backward. What a call allocates it frees. Values are normal, and at 1 bit, which
takes none below zero, a ReLU's of these; alpha is LSQ's start. Rounds are interleaved within the process: each times
every row once, as many calls of it as ReLU fits into some milliseconds, after one that is not timed, and a ratio is
taken within its round. --json: a case per threads, size and bits, with the ratios to `ReLU` as median, low and high
(the 10th and 90th percentile of the rounds), and milliseconds.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from machine import line, machine
from rounds import interleaved, markdown, quotients, said, spread
from torch import Tensor

from brqat import kernels
from brqat.bins import site_table
from brqat.grid import uniform_grid
from brqat.kernels import Bins
from brqat.quantizer.lsq import lsq

RELU, LSQ, BR = "ReLU", "LSQ", "LSQ+BR"
PLAIN = ", plain PyTorch"
ELEMENTS_IN_A_ROUND = 4_000_000  # of one row, for sizes below that


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    kernels.choose("native", torch.device("cpu"))  # an error where there is no compiler: nothing to compare
    cases = []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for size in given.sizes:
            cases += [case(threads, size, bits, given.rounds) for bits in given.bits]
    found = {"cases": cases, "machine": machine()}
    print(json.dumps(found, indent=1) if given.json else table(found))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch")
    parser.add_argument("--sizes", type=lambda text: int(float(text)), nargs="+", default=[10**4, 10**6, 10**7])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    given = parser.parse_args(arguments)
    if min(given.threads + given.sizes + given.bits + [given.rounds]) < 1:
        parser.error("--threads, --sizes, --bits and --rounds take 1 or more")
    return given


def case(threads: int, size: int, bits: int, rounds: int) -> dict:
    times = interleaved(rows(size, bits), rounds, max(1, ELEMENTS_IN_A_ROUND // size))
    return {
        "threads": threads,
        "elements": size,
        "bits": bits,
        "ratio": {name: spread(quotients(of, times[RELU])) for name, of in times.items() if name != RELU},
        "milliseconds": {name: 1e3 * statistics.median(of) for name, of in times.items()},
    }


def rows(size: int, bits: int) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    v, grad = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    grid = uniform_grid(bits, signed=bits > 1)
    if bits == 1:
        v.relu_()
    alpha = 2 * v.abs().mean() / grid.qp**0.5  # ()
    v.requires_grad_()
    alpha.requires_grad_()
    grad_mse = torch.randn(grid.num_levels, generator=generator)
    scale = (size * grid.qp) ** -0.5

    def relu() -> list[Tensor]:
        return [torch.relu(v)]

    def native(bins: Bins | None) -> list[Tensor]:
        out = kernels.lsq(v, alpha, alpha, grid, scale, False, bins)
        return [out.v_hat] if bins is None else [out.v_hat, out.mse]

    def plain(bins: Bins | None) -> list[Tensor]:
        v_hat, codes = lsq(v, alpha, grid, scale)
        return [v_hat] if bins is None else [v_hat, site_table(v, codes, alpha, grid, bins).mse]

    def call(forward: Callable[..., list[Tensor]], *args: Bins | None) -> None:
        v.grad = alpha.grad = None
        outputs = forward(*args)
        torch.autograd.backward(outputs, [grad, grad_mse][: len(outputs)])

    return {
        RELU: lambda: call(relu),
        LSQ: lambda: call(native, None),
        BR: lambda: call(native, Bins()),
        LSQ + PLAIN: lambda: call(plain, None),
        BR + PLAIN: lambda: call(plain, Bins()),
    }


def table(found: dict) -> str:
    names = list(found["cases"][0]["ratio"])
    cells = [["threads", "elements", "bits", "ReLU, ms", *names]]
    for one in found["cases"]:
        ratios = [said(one["ratio"][name], 2) for name in names]
        relu = f"{one['milliseconds'][RELU]:.3g}"
        cells.append([one["threads"], f"{one['elements']:,}", one["bits"], relu, *ratios])
    facts = found["machine"] | {"threads": "as in the table"}
    return "\n".join(["Times of ReLU's (10% to 90% of rounds)", "", markdown(cells), "", line(facts)])


if __name__ == "__main__":
    main()
