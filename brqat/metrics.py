"""How tightly the values of a site gather at their levels.

With u = v / alpha, c its code and e = u - c, one pass over the values gives sums (`site_sums`); sums of several batches
add up, and `level_metrics` turns them into figures. Nothing here averages averages.

    effectiveness          100 * (1 - 2 * mean|e|); 50 for values spread evenly in their bins, negative where many clip
    effectiveness_inside   the same over values that are not clipped
    effectiveness_nonzero  the same over v != 0: the zeros of a ReLU sit on their level for free
    clip_fraction          share beyond the end levels; clip_low and clip_high apart
    within_1pct, _5pct     100 * P(|e| < .01), .05
    mse_step               mean e^2, in units of alpha^2; 1/12 for values spread evenly
    sqnr_db                10 * log10(sum v^2 / sum (v - c * alpha)^2)
    bin_offset, bin_std    per bin: mean e, and its biased standard deviation
    occupancy, entropy     per bin: share of the values; and -sum p log2 p
    flip_grid              share of codes that changed by alpha's move alone since the last evaluation

A figure over nothing (nonzero values of a dead layer) is None, not a flattering 100.
"""

import math

import torch
from torch import Tensor

from brqat import kernels
from brqat.bins import as_float, bin_count, bin_index, bin_sum
from brqat.grid import Grid
from brqat.quantizer.base import Quantizer

# The scalars at the head of a site's sums; per-bin tables and the histogram follow.
SCALARS = (
    "n", "abs", "square", "inside_n", "inside_abs", "nonzero_n", "nonzero_abs", "low", "high",
    "within_1", "within_5", "v_square", "error_square", "moved_by_alpha", "nonfinite",
)  # fmt: skip

# A site's scalar figures that aggregate over sites, and which end of each is the worst.
WORST_IS_LOW = ("effectiveness", "effectiveness_inside", "effectiveness_nonzero", "within_1pct", "within_5pct",
                "sqnr_db", "entropy")  # fmt: skip
WORST_IS_HIGH = ("clip_fraction", "mse_step", "dead_bins", "flip_rate", "flip_rate_step", "flip_grid",
                 "oscillation", "oscillation_share", "alpha_drift", "alpha_path", "alpha_grad_ce",
                 "alpha_grad_br", "alpha_grad_br_upstream", "stability_index", "alpha_clamped",
                 "nonfinite")  # fmt: skip


def histogram_edges(grid: Grid) -> Tensor:
    """Edges of a site's histogram of v / alpha, float64: from one step below qn to one above qp.

    At most 512 bins, wandb's limit; every level lies in the middle of a bin. What lies outside counts in the end bins.
    """
    steps = grid.qp - grid.qn + 2
    per_step = max(1, min(32, 512 // (steps + 1)))
    half = 0.5 / per_step
    return torch.linspace(grid.qn - 1 - half, grid.qp + 1 + half, steps * per_step + 2, dtype=torch.float64)


@torch.no_grad()
def site_sums(site: Quantizer, v: Tensor, codes: Tensor, alpha_before: Tensor | None) -> Tensor:
    """Sums over the values of one site, a flat float64 tensor that adds up over batches.

    v, codes: what the site saw. alpha_before: its alpha at the last evaluation, None at the first.
    """
    grid, alpha = site.grid, site.alpha.detach()
    edges = histogram_edges(grid)
    first, width, bars = edges[0].item(), (edges[1] - edges[0]).item(), len(edges) - 1
    v = as_float(v)
    if kernels.native_on(v.device) and v.dtype == alpha.dtype == torch.float32:
        n, moved = v.new_tensor([v.numel()]).double(), _moved(site, v, codes, alpha_before).double()[None]
        sums = torch.ops.brqat.site_sums(v, codes, alpha, grid.qn, grid.qp, grid.gap == 2, first, width, bars)
        head = SCALARS.index("moved_by_alpha") - 1  # n comes first
        return torch.cat([n, sums[:head], moved, sums[head:]])
    u = v / alpha
    e = u - codes
    distance = e.abs()
    below, above = u < grid.qn, u > grid.qp
    inside, nonzero = ~(below | above), v != 0
    scalars = [
        torch.full((), v.numel(), device=v.device),
        distance.sum(dtype=torch.float64),
        e.square().sum(dtype=torch.float64),
        inside.sum(),
        torch.where(inside, distance, 0).sum(dtype=torch.float64),
        nonzero.sum(),
        torch.where(nonzero, distance, 0).sum(dtype=torch.float64),
        below.sum(),
        above.sum(),
        (distance < 0.01).sum(),
        (distance < 0.05).sum(),
        v.square().sum(dtype=torch.float64),
        (v - codes * alpha).square().sum(dtype=torch.float64),
        _moved(site, v, codes, alpha_before),
        (~v.isfinite()).sum(),
    ]
    index, levels = bin_index(codes, grid), grid.num_levels
    tables = [
        bin_count(index, levels).double(),
        bin_sum(index, e.double(), levels),
        bin_sum(index, e.double().square(), levels),
    ]
    position = ((u - first) / width).floor().nan_to_num(0.0).clamp(0, bars - 1).long()
    tables.append(bin_count(position, bars).double())
    return torch.cat([torch.stack([s.double() for s in scalars]), *tables])


def _moved(site: Quantizer, v: Tensor, codes: Tensor, alpha_before: Tensor | None) -> Tensor:
    """How many codes alpha's move alone has changed, a scalar."""
    if alpha_before is None or torch.equal(alpha_before, site.alpha.detach()):
        return torch.zeros((), device=v.device)
    return (site.codes(v, alpha_before) != codes).sum()


def level_metrics(sums: Tensor, grid: Grid) -> tuple[dict, Tensor]:
    """The figures of one site from its sums (on the CPU), and its histogram counts, int64."""
    s = dict(zip(SCALARS, sums[: len(SCALARS)].tolist(), strict=True))
    parts = [grid.num_levels] * 3 + [len(histogram_edges(grid)) - 1]
    count, e, e_square, histogram = sums[len(SCALARS) :].split(parts)
    n = s["n"]
    mean, square = e / count, e_square / count  # NaN in empty bins; null in the files
    p = count / n
    used = p[p > 0]
    figures = {
        "effectiveness": _effectiveness(s["abs"], n),
        "effectiveness_inside": _effectiveness(s["inside_abs"], s["inside_n"]),
        "effectiveness_nonzero": _effectiveness(s["nonzero_abs"], s["nonzero_n"]),
        "clip_fraction": (s["low"] + s["high"]) / n,
        "clip_low": s["low"] / n,
        "clip_high": s["high"] / n,
        "within_1pct": 100 * s["within_1"] / n,
        "within_5pct": 100 * s["within_5"] / n,
        "mse_step": s["square"] / n,
        "sqnr_db": _decibel(s["v_square"], s["error_square"]),
        "bin_offset": mean.tolist(),
        "bin_std": (square - mean.square()).clamp(min=0).sqrt().tolist(),
        "occupancy": p.tolist(),
        "entropy": max(0.0, -(used * used.log2()).sum().item()),
        "flip_grid": s["moved_by_alpha"] / n,
        "nonfinite": int(s["nonfinite"]),
    }
    return figures, histogram.long()


def aggregate(rows: list[dict], numel: dict[str, int]) -> dict[str, float | None]:
    """Figures of all sites of a kind at once, levels/KIND/FIGURE/{mean, plain, worst}.

    mean weighs a site by its number of values, plain by one; worst is the worst site's. First and last layers at their
    own width are left out: 8-bit sites would hide what happens at 2 bits.
    """
    out = {}
    for kind in ("weight", "act"):
        members = [row for row in rows if row["kind"] == kind and not row["exempt"]]
        for key in (*WORST_IS_LOW, *WORST_IS_HIGH):
            known = [(row[key], numel[row["site"]]) for row in members if row.get(key) is not None]
            if not known:
                continue
            values = [value for value, _ in known]
            worst = min(values) if key in WORST_IS_LOW else max(values, key=abs)
            total = sum(size for _, size in known)
            out[f"levels/{kind}/{key}/mean"] = sum(value * size for value, size in known) / total
            out[f"levels/{kind}/{key}/plain"] = sum(values) / len(values)
            out[f"levels/{kind}/{key}/worst"] = worst
    return out


def _effectiveness(total: float, n: float) -> float | None:
    return 100 * (1 - 2 * total / n) if n else None


def _decibel(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
