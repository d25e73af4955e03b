"""Level metrics against plain loops over single numbers, and what moves between evaluations against hand counts."""

import copy
import itertools
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TinyNet, lsq_scheme
from torch import nn

from brqat import checkpoint, kernels
from brqat.alpha_policy import AlphaPolicy
from brqat.files import finite
from brqat.grid import SIGN_GRID, uniform_grid
from brqat.layers import quantize, sites
from brqat.levels import LevelHistory, Oscillation, alpha_gradients, histogram_arrays, recording
from brqat.metrics import WORST_IS_HIGH, WORST_IS_LOW, aggregate, histogram_edges, level_metrics, site_sums
from brqat.quantizer.base import Seen
from brqat.quantizer.lsq import LSQ
from brqat.quantizer.sign import Sign
from brqat.regularizer.binreg import BinReg
from brqat.regularizer.none import NoRegularizer

GRIDS = [uniform_grid(b, True) for b in range(2, 9)] + [uniform_grid(b, False) for b in range(1, 9)] + [SIGN_GRID]


def site_on(grid, alpha):
    """A float64 site on a grid; alpha a number, or a tensor of one entry per channel."""
    if grid is SIGN_GRID:
        site = Sign("weight")
    else:
        bits = round(math.log2(grid.num_levels))
        site = LSQ("weight" if grid.qn < 0 else "act", bits)
    site.grid = grid
    site.alpha = nn.Parameter(torch.as_tensor(alpha, dtype=torch.float64))
    return site


def code_of(x, alpha, grid):
    if grid is SIGN_GRID:
        return -1 if x < 0 else 1
    return round(min(max(x / alpha, grid.qn), grid.qp))  # Python's round is half to even


def slow_codes(v, alpha, grid):
    alphas = torch.as_tensor(alpha, dtype=torch.float64).expand_as(v)
    flat = [code_of(x, a, grid) for x, a in zip(v.flatten().tolist(), alphas.flatten().tolist(), strict=True)]
    return torch.tensor(flat, dtype=torch.int16).view(v.shape)


def slow_figures(v, alpha, grid, alpha_before=None):
    """The docstring's definitions, one number at a time."""
    alphas = torch.as_tensor(alpha, dtype=torch.float64).expand_as(v).flatten().tolist()
    before = alphas if alpha_before is None else torch.as_tensor(alpha_before).expand_as(v).flatten().tolist()
    rows, moved = [], 0
    for x, a, b in zip(v.flatten().tolist(), alphas, before, strict=True):
        code = code_of(x, a, grid)
        moved += code_of(x, b, grid) != code
        rows.append((x, x / a, code, code * a))
    n = len(rows)

    def effectiveness(chosen):
        return 100 * (1 - 2 * math.fsum(abs(u - c) for _, u, c, _ in chosen) / len(chosen)) if chosen else None

    bins = {c: [u - c for _, u, code, _ in rows if code == c] for c in grid.codes}
    p = [len(members) / n for members in bins.values()]
    low, high = (sum(test) / n for test in ([u < grid.qn for _, u, *_ in rows], [u > grid.qp for _, u, *_ in rows]))
    noise = math.fsum((x - q) ** 2 for x, _, _, q in rows)
    return {
        "effectiveness": effectiveness(rows),
        "effectiveness_inside": effectiveness([r for r in rows if grid.qn <= r[1] <= grid.qp]),
        "effectiveness_nonzero": effectiveness([r for r in rows if r[0] != 0]),
        "clip_fraction": low + high,
        "clip_low": low,
        "clip_high": high,
        "within_1pct": 100 * sum(abs(u - c) < 0.01 for _, u, c, _ in rows) / n,
        "within_5pct": 100 * sum(abs(u - c) < 0.05 for _, u, c, _ in rows) / n,
        "mse_step": math.fsum((u - c) ** 2 for _, u, c, _ in rows) / n,
        "sqnr_db": 10 * math.log10(math.fsum(x * x for x, *_ in rows) / noise),
        "bin_offset": [np.mean(e) if e else math.nan for e in bins.values()],
        "bin_std": [np.std(e) if e else math.nan for e in bins.values()],
        "occupancy": p,
        "entropy": -math.fsum(q * math.log2(q) for q in p if q),
        "flip_grid": moved / n,
        "nonfinite": 0,
    }


def assert_figures(figures, expected):
    assert figures.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert figures[key] is None, key
        else:
            np.testing.assert_allclose(figures[key], value, rtol=1e-9, atol=1e-9, equal_nan=True, err_msg=key)


def values_for(grid, shape, seed):
    """Spread over the grid and beyond both ends, a tenth of them zero and a tenth near a level."""
    generator = torch.Generator().manual_seed(seed)
    u = (torch.rand(shape, generator=generator, dtype=torch.float64) * 1.6 - 0.3) * (grid.qp - grid.qn) + grid.qn
    kind = torch.rand(shape, generator=generator)
    near = u.round() + torch.randn(shape, generator=generator, dtype=torch.float64) * 0.03
    return torch.where(kind < 0.1, 0.0, torch.where(kind < 0.2, near, u))


def figures_of(v, alpha, grid, alpha_before=None):
    return level_metrics(site_sums(site_on(grid, alpha), v, slow_codes(v, alpha, grid), alpha_before), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_figure_equals_the_slow_reference(grid):
    v, before = values_for(grid, (6, 50), 3) * 0.37, torch.tensor(0.31, dtype=torch.float64)
    figures, _ = figures_of(v, 0.37, grid, before)
    expected = slow_figures(v, 0.37, grid, before)
    assert expected["clip_fraction"] > 0 and (expected["flip_grid"] > 0) == (grid is not SIGN_GRID)
    assert_figures(figures, expected)


@pytest.mark.parametrize("grid", [uniform_grid(2, True), uniform_grid(4, True), SIGN_GRID], ids=str)
def test_every_figure_equals_the_slow_reference_per_channel(grid):
    alpha = torch.tensor([[0.2], [0.5], [1.3]], dtype=torch.float64)
    before = torch.tensor([[0.2], [0.4], [1.9]], dtype=torch.float64)
    v = values_for(grid, (3, 80), 4) * alpha
    assert_figures(figures_of(v, alpha, grid, before)[0], slow_figures(v, alpha, grid, before))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sums_in_one_pass_are_those_of_plain_torch(native, grid, per_channel):
    """Over several pieces, with edges, NaN and infinity; a block is summed in float, so not to the last bit."""
    alpha = torch.tensor([[0.2], [0.5], [1.25]]) if per_channel else torch.tensor(0.25)
    v = (values_for(grid, (3, 30_001), 8) * alpha).float()
    v[0, :6] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30])
    site, before = site_on(grid, alpha), alpha * 1.1
    site.alpha = nn.Parameter(alpha)
    codes = site.codes(v, alpha).nan_to_num(grid.qn).to(torch.int16)
    for part in (v[:, 6:], v):  # without and with what is not finite
        ours = site_sums(site, part, codes[:, -part.shape[1] :], before)
        kernels.choose("torch", torch.device("cpu"))
        theirs = site_sums(site, part, codes[:, -part.shape[1] :], before)
        kernels.choose("native", torch.device("cpu"))
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-4, equal_nan=True)


@pytest.mark.parametrize("grid", [uniform_grid(2, True), uniform_grid(3, False), uniform_grid(8, False), SIGN_GRID])
def test_sums_of_two_parts_add_up_to_the_whole(grid):
    v = values_for(grid, (60, 7), 5) * 0.4
    site, codes = site_on(grid, 0.4), slow_codes(v, 0.4, grid)
    before = torch.tensor(0.3, dtype=torch.float64)
    whole = site_sums(site, v, codes, before)
    parts = site_sums(site, v[:13], codes[:13], before) + site_sums(site, v[13:], codes[13:], before)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert_figures(level_metrics(parts, grid)[0], slow_figures(v, 0.4, grid, before))


@pytest.mark.parametrize("grid", [uniform_grid(2, True), uniform_grid(4, True), uniform_grid(2, False)], ids=str)
def test_values_spread_evenly_in_their_bins_give_the_textbook_figures(grid):
    count = 20_000 * grid.num_levels
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / 20_000 + grid.qn - 0.5
    codes = u.round().to(torch.int16)
    figures, _ = level_metrics(site_sums(site_on(grid, 1.0), u, codes, None), grid)
    assert figures["effectiveness"] == pytest.approx(50, abs=0.01)
    assert figures["within_1pct"] == pytest.approx(2, abs=0.02)
    assert figures["within_5pct"] == pytest.approx(10, abs=0.02)
    assert figures["mse_step"] == pytest.approx(1 / 12, abs=1e-6)
    assert figures["bin_std"] == pytest.approx([0.288675] * grid.num_levels, abs=1e-5)
    assert figures["bin_offset"] == pytest.approx([0.0] * grid.num_levels, abs=1e-6)
    assert figures["entropy"] == pytest.approx(math.log2(grid.num_levels))


@pytest.mark.parametrize("bits, with_zeros, without", [(2, 62.6, 25.1), (3, 71.7, 43.3)])
def test_zeros_of_a_relu_flatter_effectiveness_and_not_effectiveness_nonzero(bits, with_zeros, without):
    """A standard normal behind a ReLU, under LSQ's start; figures computed apart, on 200,000 values."""
    v = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).relu()
    figures, _ = figures_of(v, 2 * v.mean().item() / math.sqrt(2**bits - 1), uniform_grid(bits, False))
    assert figures["effectiveness"] == pytest.approx(with_zeros, abs=1)
    assert figures["effectiveness_nonzero"] == pytest.approx(without, abs=2)


def test_a_dead_layer_has_no_effectiveness_nonzero_and_no_sqnr():
    figures, _ = figures_of(torch.zeros(50, dtype=torch.float64), 0.3, uniform_grid(2, False))
    assert figures["effectiveness_nonzero"] is None and figures["sqnr_db"] is None
    assert figures["effectiveness"] == 100 and figures["entropy"] == 0


def test_values_that_are_all_clipped_make_effectiveness_negative():
    figures, _ = figures_of(torch.full((9,), 5.0, dtype=torch.float64), 1.0, uniform_grid(2, False))
    assert figures["effectiveness"] == 100 * (1 - 2 * 2.0)
    assert figures["effectiveness_inside"] is None and figures["clip_high"] == 1


def test_nonfinite_values_are_counted():
    v = torch.tensor([0.1, math.nan, math.inf, -0.3], dtype=torch.float64)
    site = site_on(uniform_grid(2, True), 0.4)
    codes = torch.tensor([0, 0, 1, -1], dtype=torch.int16)
    assert level_metrics(site_sums(site, v, codes, None), site.grid)[0]["nonfinite"] == 2


def test_bfloat16_values_are_measured_in_float32():
    grid = uniform_grid(2, True)
    v = (values_for(grid, (400,), 8) * 0.4).bfloat16()
    exact = v.double()
    site = site_on(grid, 0.4)
    sums = site_sums(site, v, slow_codes(exact, 0.4, grid), None)
    assert level_metrics(sums, grid)[0]["mse_step"] == pytest.approx(slow_figures(exact, 0.4, grid)["mse_step"])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_histogram_has_every_value_and_every_level_mid_bin(grid):
    edges = histogram_edges(grid).numpy()
    widths = np.diff(edges)
    assert len(widths) <= 512
    np.testing.assert_allclose(widths, widths[0], rtol=1e-9)
    assert edges[0] < grid.qn - 1 < grid.qp + 1 < edges[-1]
    for code in grid.codes:
        i = np.searchsorted(edges, code) - 1
        assert code == pytest.approx((edges[i] + edges[i + 1]) / 2, abs=1e-9)
    u = torch.cat([values_for(grid, (500,), 1), torch.tensor([-1e9, 1e9], dtype=torch.float64)])
    _, counts = figures_of(u * 0.37, 0.37, grid)
    assert counts.dtype == torch.int64 and counts.sum() == 502
    expected, _ = np.histogram(np.clip(u.numpy(), edges[0], edges[-1]), bins=edges)
    assert counts.tolist() == expected.tolist()


def row(site, kind="weight", exempt=False, **figures):
    return {"site": site, "kind": kind, "exempt": exempt, **figures}


def test_aggregate_is_weighted_plain_and_worst_without_exempt_sites():
    rows = [
        row("a", effectiveness=50.0, clip_fraction=0.1, alpha_drift=-0.9, sqnr_db=None),
        row("b", effectiveness=80.0, clip_fraction=0.4, alpha_drift=0.5, sqnr_db=7.0),
        row("first", exempt=True, effectiveness=1.0, clip_fraction=0.99, alpha_drift=9.0, sqnr_db=1.0),
        row("a.in", kind="act", effectiveness=20.0, clip_fraction=0.2),
    ]
    out = aggregate(rows, {"a": 30, "b": 10, "first": 1000, "a.in": 5})
    assert out == pytest.approx(
        {
            "levels/weight/effectiveness/mean": (50 * 30 + 80 * 10) / 40,
            "levels/weight/effectiveness/plain": 65.0,
            "levels/weight/effectiveness/worst": 50.0,
            "levels/weight/clip_fraction/mean": (0.1 * 30 + 0.4 * 10) / 40,
            "levels/weight/clip_fraction/plain": 0.25,
            "levels/weight/clip_fraction/worst": 0.4,
            "levels/weight/alpha_drift/mean": (-0.9 * 30 + 0.5 * 10) / 40,
            "levels/weight/alpha_drift/plain": -0.2,
            "levels/weight/alpha_drift/worst": -0.9,  # the one that went farthest, whichever way
            "levels/weight/sqnr_db/mean": 7.0,
            "levels/weight/sqnr_db/plain": 7.0,
            "levels/weight/sqnr_db/worst": 7.0,
            "levels/act/effectiveness/mean": 20.0,
            "levels/act/effectiveness/plain": 20.0,
            "levels/act/effectiveness/worst": 20.0,
            "levels/act/clip_fraction/mean": 0.2,
            "levels/act/clip_fraction/plain": 0.2,
            "levels/act/clip_fraction/worst": 0.2,
        }
    )


def test_aggregate_of_nothing_is_nothing():
    assert aggregate([row("first", exempt=True, effectiveness=1.0)], {"first": 3}) == {}
    assert not set(WORST_IS_LOW) & set(WORST_IS_HIGH)


def nagel(histories):
    """Nagel et al. 2022, Eq. 8-10, for each weight's list of codes: final frequencies."""
    frequencies = []
    for codes in histories:
        frequency, direction = 0.0, 0
        for before, now in itertools.pairwise(codes):
            oscillates = now != before and direction != 0 and (1 if now > before else -1) != direction
            if now != before:
                direction = 1 if now > before else -1
            frequency = 0.01 * oscillates + 0.99 * frequency
        frequencies.append(frequency)
    return frequencies


def test_oscillation_equals_a_simulation_of_single_weights(each_kernels):
    draw = random.Random(0)
    sizes = {"a.weight": (4, 5), "b.weight": (7,)}
    followed = {name: SimpleNamespace(kind="weight", seen=None) for name in sizes}
    ignored = {"a.input": SimpleNamespace(kind="act", seen=None)}
    oscillation = Oscillation(followed | ignored)
    assert oscillation.report() == {}
    histories = {name: [[draw.randrange(-2, 2)] for _ in range(math.prod(s))] for name, s in sizes.items()}
    rate = {name: [draw.choice([0.0, 0.05, 0.3, 0.9]) for _ in h] for name, h in histories.items()}
    reported_at = 21  # flips are counted anew from here on
    for step in range(60):
        for name, site in followed.items():
            if step:
                for codes, chance in zip(histories[name], rate[name], strict=True):
                    codes.append(draw.randrange(-2, 2) if draw.random() < chance else codes[-1])
            now = torch.tensor([codes[-1] for codes in histories[name]], dtype=torch.int8).view(sizes[name])
            site.seen = Seen(now.shape, None, now)
        oscillation.step()
        if step == reported_at:
            oscillation.report()
    report = oscillation.report()
    assert report.keys() == sizes.keys()
    for name, (flips, mean, share) in report.items():
        expected = nagel(histories[name])
        changes = sum(a != b for codes in histories[name] for a, b in itertools.pairwise(codes[21:]))
        assert len(histories[name][0]) == 60 and 0 < np.mean([f > 0.005 for f in expected]) < 1
        assert flips.item() == pytest.approx(changes / 38 / len(expected))  # 38 steps since the report
        assert mean.item() == pytest.approx(np.mean(expected), rel=1e-5)
        assert share.item() == pytest.approx(np.mean([f > 0.005 for f in expected]))


def test_oscillation_of_a_long_stretch_without_a_report(each_kernels):
    """Frequencies are kept as what they will have faded to; float32 holds that for some thousand steps only."""
    site = SimpleNamespace(kind="weight", seen=None)
    oscillation, history = Oscillation({"a": site}), []
    for step in range(12_000):
        history.append(step % 2 if step < 11_900 else 0)
        codes = torch.tensor([history[-1], 0], dtype=torch.int8)
        site.seen = Seen(codes.shape, None, codes)
        oscillation.step()
    _, mean, share = oscillation.report()["a"]
    assert mean.item() == pytest.approx(nagel([history])[0] / 2, rel=1e-4) and share.item() == 0.5


def test_oscillation_of_weights_in_channels_last_is_the_same_with_both_kernels(native):
    """A run may be resumed with the others."""
    states = []
    for kernel in ("torch", "native"):
        kernels.choose(kernel, torch.device("cpu"))
        draw = torch.Generator().manual_seed(0)
        site = SimpleNamespace(kind="weight", seen=None)
        oscillation = Oscillation({"a": site})
        for _ in range(20):
            codes = torch.randint(-2, 2, (4, 3, 3, 3), generator=draw).to(torch.int8)
            site.seen = Seen(codes.shape, None, codes.contiguous(memory_format=torch.channels_last))
            oscillation.step()
        states.append(oscillation.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) if isinstance(value, torch.Tensor) else value == states[1][key], key


def test_a_checkpoint_of_the_first_oscillation_is_counted_anew(caplog):
    oscillation = Oscillation({"a": SimpleNamespace(kind="weight", seen=None)})
    old = {"last": torch.zeros(4, dtype=torch.int16), "direction": torch.zeros(4, dtype=torch.int8), "steps": 3}
    old |= {"frequency": torch.zeros(4), "flips": torch.zeros(4, dtype=torch.int32), "sizes": [4]}
    oscillation.load_state_dict(old)
    assert oscillation.last is None and "anew" in caplog.text and oscillation.report() == {}


BATCHES = [torch.randn(80, 1, 6, 6, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]


def by_site(rows):
    return {r["site"]: r for r in rows}


def seen_by(model, batches):
    """v of every site over all batches, caught by hooks of our own."""
    caught, hooks = defaultdict(list), []
    for name, site in sites(model).items():
        hook = site.register_forward_pre_hook(lambda _, args, name=name: caught[name].append(args[0].detach().clone()))
        hooks.append(hook)
    with torch.no_grad():
        for pictures in batches:
            model(pictures)
    for hook in hooks:
        hook.remove()
    return caught


def codes_by_hand(v, alpha, grid):
    return np.round(np.clip(v.numpy() / alpha.detach().numpy(), *grid))


def scale_alpha(site, factor):
    with torch.no_grad():
        site.alpha.mul_(factor)


def test_evaluate_measures_every_site_over_all_batches(quantized):
    quantized.eval()
    found = sites(quantized)
    rows, histograms = LevelHistory(found, Oscillation(found), 0).evaluate(quantized, BATCHES, 1)
    caught = seen_by(quantized, BATCHES)
    assert [r["site"] for r in rows] == list(found) == list(histograms)
    for name, figures in by_site(rows).items():
        site = found[name]
        v = torch.cat(caught[name]) if site.kind == "act" else caught[name][0]
        codes = codes_by_hand(v, site.alpha, site.grid)
        u = v.double().numpy() / site.alpha.item()
        assert figures["effectiveness"] == pytest.approx(100 * (1 - 2 * np.abs(u - codes).mean()), abs=1e-3)
        assert figures["occupancy"] == pytest.approx([(codes == c).mean() for c in site.grid.codes])
        assert figures["alpha"] == pytest.approx(site.alpha.item())
        assert figures["numel"] == (v[0].numel() if site.kind == "act" else v.numel())
        assert histograms[name].sum() == v.numel()
        assert (figures["bits"], figures["kind"], figures["exempt"]) == (site.bits, site.kind, site.exempt)
        assert site.seen is None and site.recording is False
    arrays = histogram_arrays(found, histograms, 7)
    assert set(arrays) == {f"{name}@{end}" for name in found for end in ("7", "edges")}


def test_flip_rate_is_unknown_first_and_then_the_share_of_codes_that_changed(quantized):
    quantized.eval()
    found, history = sites(quantized), LevelHistory(sites(quantized), Oscillation(sites(quantized)), 0)
    first = by_site(history.evaluate(quantized, BATCHES, 1)[0])
    assert {r["flip_rate"] for r in first.values()} == {None}
    before = {n: codes_by_hand(v[0], found[n].alpha, found[n].grid) for n, v in seen_by(quantized, BATCHES).items()}
    with torch.no_grad():
        quantized.conv2.weight.add_(0.3 * torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    second = by_site(history.evaluate(quantized, BATCHES, 2)[0])
    after = {n: codes_by_hand(v[0], found[n].alpha, found[n].grid) for n, v in seen_by(quantized, BATCHES).items()}
    for name, site in found.items():
        few = slice(64) if site.kind == "act" else slice(None)  # the first 64 pictures
        assert second[name]["flip_rate"] == pytest.approx((before[name][few] != after[name][few]).mean()), name
        assert second[name]["flip_grid"] == 0  # no alpha moved
    assert second["conv2.weight"]["flip_rate"] > 0 and second["conv3.input"]["flip_rate"] > 0
    assert second["conv1.weight"]["flip_rate"] == 0
    third = by_site(history.evaluate(quantized, BATCHES, 3)[0])
    assert {r["flip_rate"] for r in third.values()} == {0.0}


def test_flip_grid_is_the_share_of_codes_that_alphas_move_alone_changed(quantized):
    quantized.eval()
    found, history = sites(quantized), LevelHistory(sites(quantized), Oscillation(sites(quantized)), 0)
    first = by_site(history.evaluate(quantized, BATCHES, 1)[0])
    assert {r["flip_grid"] for r in first.values()} == {0.0}
    moved = {"conv2.weight": 1.4, "conv3.input": 0.6}
    for name, factor in moved.items():
        scale_alpha(found[name], factor)
    with torch.no_grad():  # weights move as well: they are not to count
        quantized.conv2.weight.add_(0.2 * torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
    second = by_site(history.evaluate(quantized, BATCHES, 2)[0])
    caught = seen_by(quantized, BATCHES)
    for name, site in found.items():
        v = torch.cat(caught[name]) if site.kind == "act" else caught[name][0]
        now = codes_by_hand(v, site.alpha, site.grid)
        then = codes_by_hand(v, torch.tensor(first[name]["alpha"]), site.grid)
        assert second[name]["flip_grid"] == pytest.approx((now != then).mean()), name
        assert (second[name]["flip_grid"] > 0) == (name in moved)
    third = by_site(history.evaluate(quantized, BATCHES, 3)[0])
    assert {r["flip_grid"] for r in third.values()} == {0.0}


def test_alpha_drift_and_path_count_from_the_end_of_warmup(quantized):
    quantized.eval()
    found, history = sites(quantized), LevelHistory(sites(quantized), Oscillation(sites(quantized)), 2)
    seen = []
    for epoch, factor in ((0, 1.0), (1, 3.0), (2, 1.5), (3, 2.0), (4, 0.25), (5, 1.0)):
        for site in found.values():
            scale_alpha(site, factor)
        rows = history.evaluate(quantized, BATCHES[:1], epoch)[0]
        values = {(r["alpha_drift"], r["alpha_path"]) for r in rows}
        seen.append([tuple(None if x is None else round(x, 5) for x in pair) for pair in values])
    ln2 = math.log(2)
    none, zero = (None, None), (0.0, 0.0)
    for pairs, expected in zip(seen, [none, none, zero, (ln2, ln2), (-ln2, 3 * ln2), (-ln2, 3 * ln2)], strict=True):
        for pair in pairs:
            assert pair == (pytest.approx(expected, abs=2e-5) if expected != none else none)


def test_without_warmup_the_alphas_given_to_the_history_are_the_reference(quantized):
    quantized.eval()
    history = LevelHistory(sites(quantized), Oscillation(sites(quantized)), 0)
    for site in sites(quantized).values():
        scale_alpha(site, 0.5)
    for r in history.evaluate(quantized, BATCHES[:1], 1)[0]:
        assert (r["alpha_drift"], r["alpha_path"]) == pytest.approx((-math.log(2), math.log(2)), abs=1e-5)


def test_drift_of_alphas_per_channel_is_their_mean(pictures):
    torch.manual_seed(0)
    model = TinyNet().eval()
    scheme = lsq_scheme(per_channel=True)
    quantize(model, pictures, scheme._replace(inner=scheme.inner._replace(act=None), outer=None))
    history = LevelHistory(sites(model), Oscillation(sites(model)), 0)
    site, factors = sites(model)["conv2.weight"], torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0, 1.0, 1.0, 0.5])
    scale_alpha(site, factors.view(8, 1, 1, 1))
    figures = by_site(history.evaluate(model, [pictures], 1)[0])["conv2.weight"]
    logs = [math.log(f) for f in factors.tolist()]
    assert figures["alpha_drift"] == pytest.approx(sum(logs) / 8, abs=1e-5)
    assert figures["alpha_path"] == pytest.approx(sum(map(abs, logs)) / 8, abs=1e-5)


def test_dead_bins_are_those_empty_in_five_evaluations_running(quantized):
    quantized.eval()
    history, alpha = (
        LevelHistory(sites(quantized), Oscillation(sites(quantized)), 0),
        sites(quantized)["conv2.weight"].alpha.item(),
    )
    full = torch.linspace(-2, 1, 576).view(8, 8, 3, 3) * alpha
    without_lowest, without_ends = full.clamp(min=-alpha), full.clamp(-alpha, 0)
    dead = []
    stages = [full, *[without_lowest] * 4, full, without_lowest, *[without_ends] * 5]
    for epoch, weight in enumerate(stages):
        with torch.no_grad():
            quantized.conv2.weight.copy_(weight)
        dead.append(by_site(history.evaluate(quantized, BATCHES[:1], epoch)[0])["conv2.weight"]["dead_bins"])
    # Four in a row do not count; then the lowest is dead a stage before the highest.
    assert dead == [0] * 10 + [1, 2]


def train_step(model, history, seed):
    """Moves all weights; the history follows the codes, as training does."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("conv2.weight", "conv3.weight")):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    with recording(sites(model).values()):
        model(BATCHES[0])
        history.oscillation.step()


def test_state_dict_round_trip_gives_the_same_next_evaluation(quantized, tmp_path):
    quantized.eval()
    found = sites(quantized)
    history = LevelHistory(found, Oscillation(found), 1)
    for epoch in range(6):
        for step in range(4):
            train_step(quantized, history, 10 * epoch + step)
        scale_alpha(found["conv2.weight"], 1.1)
        history.evaluate(quantized, BATCHES, epoch)
    train_step(quantized, history, 98)
    checkpoint.save(tmp_path / "history.pt", history.state_dict())
    resumed = LevelHistory(found, Oscillation(found), 1)
    resumed.load_state_dict(checkpoint.load(tmp_path / "history.pt"))
    weights = copy.deepcopy(quantized.state_dict())
    scale_alpha(found["conv2.weight"], 1.3)
    scaled = copy.deepcopy(found["conv2.weight"].alpha.detach())
    train_step(quantized, history, 99)
    rows, histograms = history.evaluate(quantized, BATCHES, 6)
    quantized.load_state_dict(weights)
    with torch.no_grad():
        found["conv2.weight"].alpha.copy_(scaled)
    train_step(quantized, resumed, 99)
    again, histograms_again = resumed.evaluate(quantized, BATCHES, 6)
    assert finite(rows) == finite(again)
    assert all(torch.equal(histograms[name], histograms_again[name]) for name in histograms)
    figures = by_site(rows)["conv2.weight"]
    assert min(figures[key] for key in ("flip_rate", "flip_rate_step", "oscillation", "flip_grid", "alpha_path")) > 0
    # A history that was not resumed says something else, so that the comparison above can fail.
    assert finite(LevelHistory(found, Oscillation(found), 1).evaluate(quantized, BATCHES, 6)[0]) != finite(rows)


def pull_by_hand(v, alpha, grid):
    """Han et al.: dL/dalpha = -2 * sum over bins of i * (mean_i - i * alpha), in float64."""
    codes, values = codes_by_hand(v, alpha, grid), v.double().numpy()
    total = 0.0
    for i in grid.codes:
        members = values[codes == i]
        if members.size:
            total -= 2 * i * (members.mean() - i * alpha.item())
    return total


def gradients_of(model, pictures, labels, policy, regularizer, strength):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer.param_groups[-1]["base_lr"] = 0.01
    found = sites(model)
    return alpha_gradients(model, pictures, labels, found, regularizer, policy, strength, optimizer)


def test_alpha_gradients_equal_autograd_on_losses_written_by_hand(quantized, pictures):
    quantized.eval()
    found, labels, strength = sites(quantized), torch.arange(16) % 4, {"weight": 0.7, "act": 0.3}
    got = gradients_of(quantized, pictures, labels, AlphaPolicy("backprop", "backprop"), BinReg(1.0, 1.0), strength)
    assert got.keys() == found.keys() and all(site.seen is None for site in found.values())
    assert all(p.grad is None for p in quantized.parameters())

    log_probability = quantized(pictures).log_softmax(1)
    loss = -sum(log_probability[i, label] for i, label in enumerate(labels.tolist())) / 16
    alphas = [site.alpha for site in found.values()]
    for name, grad in zip(found, torch.autograd.grad(loss, alphas), strict=True):
        assert got[name]["alpha_grad_ce"] == pytest.approx(grad.abs().item(), rel=1e-4, abs=1e-9), name

    caught = {name: v[0] for name, v in seen_by(quantized, [pictures]).items()}
    for name, site in found.items():
        own = 0.0 if site.exempt else strength[site.kind] * pull_by_hand(caught[name], site.alpha.detach(), site.grid)
        assert got[name]["alpha_grad_br"] == pytest.approx(abs(own), rel=1e-3, abs=1e-6), name
    assert got["conv2.weight"]["alpha_grad_br"] > 0 and got["conv3.input"]["alpha_grad_br"] > 0

    # Upstream: the activation penalties with their own alphas held, over live values.
    live, hooks = {}, []
    for name in ("conv2.input", "conv3.input"):
        hooks.append(found[name].register_forward_pre_hook(lambda _, args, name=name: live.update({name: args[0]})))
    quantized(pictures)
    for hook in hooks:
        hook.remove()
    penalty = 0.0
    for name, v in live.items():
        site, alpha = found[name], found[name].alpha.detach()
        codes = torch.from_numpy(codes_by_hand(v.detach(), alpha, site.grid))
        for i in site.grid.codes:
            if (codes == i).any():
                penalty = penalty + strength["act"] * (v[codes == i] - i * alpha).square().mean()
    for (name, _), grad in zip(found.items(), torch.autograd.grad(penalty, alphas, allow_unused=True), strict=True):
        expected = 0.0 if grad is None else grad.abs().item()
        assert got[name]["alpha_grad_br_upstream"] == pytest.approx(expected, rel=1e-3, abs=1e-6), name
    assert got["conv2.weight"]["alpha_grad_br_upstream"] > 0 and got["conv1.input"]["alpha_grad_br_upstream"] > 0


def test_the_regularizers_own_gradient_is_exactly_zero_unless_the_policy_is_backprop(quantized, pictures):
    labels, strength = torch.arange(16) % 4, {"weight": 1.0, "act": 1.0}
    policy = AlphaPolicy("learnable", "backprop")
    got = gradients_of(quantized.eval(), pictures, labels, policy, BinReg(1.0, 1.0), strength)
    for name, site in sites(quantized).items():
        assert (got[name]["alpha_grad_br"] > 0) == (site.kind == "act" and not site.exempt), name
        assert got[name]["alpha_grad_ce"] > 0
    none = gradients_of(quantized, pictures, labels, policy, NoRegularizer(), strength)
    assert {figures["alpha_grad_br"] for figures in none.values()} == {0.0}


def test_alpha_gradients_of_frozen_alphas_are_zero(quantized, pictures):
    labels, strength = torch.arange(16) % 4, {"weight": 1.0, "act": 1.0}
    for site in sites(quantized).values():
        site.alpha.requires_grad_(site.kind == "act")
    policy = AlphaPolicy("frozen", "backprop")
    got = gradients_of(quantized.eval(), pictures, labels, policy, BinReg(1.0, 1.0), strength)
    for name, site in sites(quantized).items():
        norms = [got[name][key] for key in ("alpha_grad_ce", "alpha_grad_br", "alpha_grad_br_upstream")]
        assert norms == [0.0] * 3 if site.kind == "weight" else norms[0] > 0


def test_a_code_outside_of_the_grid_counts_in_an_end_bin(each_kernels):
    site = site_on(uniform_grid(2, True), 0.5)
    site.alpha = nn.Parameter(torch.tensor(0.5))
    codes = torch.tensor([-30_000, 30_000, 0], dtype=torch.int16)
    sums = site_sums(site, torch.zeros(3), codes, None)
    assert sums[15:19].tolist() == [1, 0, 1, 1]
