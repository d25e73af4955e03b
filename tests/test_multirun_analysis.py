"""multirun_analysis on synthetic run folders; every figure is recomputed here, from the numbers written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from multirun_analysis import load, plots, tables
from multirun_analysis.__main__ import main

ACCURACY = {0.0: [0.951, 0.957, 0.949], 1.0: [0.981, 0.987, 0.9795]}  # lambda_br -> by seed


def edges_of(qn: int, qp: int, bars_per_step: int) -> np.ndarray:
    """From one step below qn to one above qp, every level in the middle of a bar: brqat.metrics' edges."""
    half = 0.5 / bars_per_step
    return np.linspace(qn - 1 - half, qp + 1 + half, (qp - qn + 2) * bars_per_step + 2)


def write_run(folder: Path, *, lambda_br=1.0, seed=0, epochs=6, warmup=2, summary=None, **settings) -> Path:
    """A run as brqat leaves it: two 2-bit layers and an 8-bit one, values that gather after warmup."""
    config = {
        "quantizer": {"bits": 2, "first_last_bits": 8},
        "regularizer": {
            "_target_": "brqat.regularizer.binreg.BinReg",
            "lambda_br": lambda_br,
            "normalize": "paper",
        },
        "seed": seed,
        "epochs": epochs,
        "warmup_epochs": warmup,
        "wandb": {"name": folder.name},
        "trial": {"number": seed, "lease": folder.name},
        "resume": str(folder),
    }
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump(config | settings, sort_keys=False))
    rng = np.random.default_rng(seed)
    metrics, levels, histograms = [], [], {}
    sites = [
        (f"{layer}.{part}", bits)
        for layer, bits in {"conv1": 8, "layer1.0.conv1": 2, "layer1.0.conv2": 2}.items()
        for part in ("weight", "input")
    ]
    for epoch in range(epochs + 1):
        gathered = max(0, epoch - warmup) / epochs * min(lambda_br, 1)
        if epoch:
            metrics.append({
                "epoch": epoch, "train/loss": 2 / epoch, "train/ce": 2 / epoch + 0.05 * rng.random(),
                "train/br": 0.0 if epoch <= warmup else 9 * (1 - gathered) ** 2,
                "val/acc": 1 - 0.5 / epoch + 0.01 * rng.random(), "seconds": 1.5,
            })  # fmt: skip
        for site, bits in sites:
            act = site.endswith("input")
            levels.append({
                "epoch": epoch, "site": site, "kind": "act" if act else "weight", "bits": bits,
                "effectiveness": 50 + 45 * gathered - 4 * rng.random() if bits == 2 else 50.0,
                "clip_fraction": 0.04 * (1 - gathered) + 0.01 * rng.random(),
                "flip_rate": 0.2 / epoch if epoch else None,
                "alpha_drift": 0.1 * gathered * rng.random() if epoch >= warmup else None,
            })  # fmt: skip
            if epoch in (0, warmup, epochs):
                u = rng.normal(0, 1.2, 4000)
                u = np.maximum(u, 0) if act else u
                qn, qp = (0, 2**bits - 1) if act else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                u += gathered * (np.clip(np.round(u), qn, qp) - u)
                edges = edges_of(qn, qp, 32 if bits == 2 else 1)
                histograms[f"{site}@edges"] = edges
                histograms[f"{site}@{epoch}"] = np.histogram(np.clip(u, edges[0], edges[-1]), edges)[0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "levels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in levels))
    np.savez(folder / "histograms.npz", **histograms)
    if summary is not None:
        whole = {
            "status": "completed",
            "test_acc": 0.9,
            "val_acc": 0.91,
            "float_test_acc": 0.99,
            "seconds": 10.0,
        }
        whole |= {"objective": 0.91, "seed": seed, "versions": {"torch": "2.9"}}
        (folder / "summary.json").write_text(json.dumps(whole | summary))
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    for lambda_br, accuracies in ACCURACY.items():
        for seed, accuracy in enumerate(accuracies):
            folder = tmp_path / f"2026-01-01/{lambda_br}/deep/{seed}"
            seconds = 10.0 + seed**2
            summary = {"test_acc": accuracy, "val_acc": accuracy + 0.004, "seconds": seconds}
            write_run(folder, lambda_br=lambda_br, seed=seed, summary=summary)
    return tmp_path


def test_mean_sd_and_n_are_those_of_the_numbers_written(sweep):
    table = tables.settings_table(load.load_runs([sweep]).frame)
    assert list(table["config.regularizer.lambda_br"]) == [0.0, 1.0]
    for row, accuracies in zip(table.to_dict("records"), ACCURACY.values(), strict=True):
        assert row["seeds"] == [0, 1, 2]
        assert row["test_acc_n"] == 3
        assert row["test_acc_mean"] == pytest.approx(np.mean(accuracies))
        assert row["test_acc_sd"] == pytest.approx(stats.tstd(accuracies))  # tstd is ddof=1
        assert row["val_acc_mean"] == pytest.approx(np.mean(accuracies) + 0.004)
        assert row["seconds_sd"] == pytest.approx(stats.tstd([10, 11, 14]))


def test_markdown_shows_percent_with_one_decimal(sweep):
    text = tables.to_markdown(tables.settings_table(load.load_runs([sweep]).frame))
    header, _, zero, one = text.splitlines()
    assert [cell.strip() for cell in header.split("|")[1:4]] == [
        "regularizer.lambda_br",
        "seeds",
        "test_acc %",
    ]
    assert "95.2 +- 0.4 (n=3)" in zero and "98.2 +- 0.4 (n=3)" in one
    assert len({len(line) for line in text.splitlines()}) == 1


def test_a_single_run_has_no_spread(tmp_path):
    write_run(tmp_path / "0", summary={"test_acc": 0.986})
    text = tables.to_markdown(tables.settings_table(load.load_runs([tmp_path]).frame))
    assert "98.6 (n=1)" in text
    assert "+-" not in text and "nan" not in text


def test_only_completed_runs_enter_the_means(sweep):
    for seed, status in enumerate(["diverged", "pruned", "failed", "interrupted"], start=3):
        write_run(sweep / status, seed=seed, summary={"status": status, "test_acc": 0.1})
    write_run(sweep / "unfinished", seed=9)
    runs = load.load_runs([sweep])
    row = tables.settings_table(runs.frame).iloc[-1]
    assert row["test_acc_mean"] == pytest.approx(np.mean(ACCURACY[1.0]))
    assert row["seeds"] == [0, 1, 2]
    assert row["not_completed"] == "1 diverged, 1 failed, 1 interrupted, 1 pruned, 1 unfinished"
    assert "11 runs: 6 completed, 1 diverged, 1 failed" in tables.footer(runs)


def test_a_setting_with_no_completed_run_keeps_its_row(sweep):
    write_run(sweep / "strong", lambda_br=100.0, summary={"status": "diverged", "test_acc": float("nan")})
    row = tables.settings_table(load.load_runs([sweep]).frame).iloc[-1]
    assert row["config.regularizer.lambda_br"] == 100.0
    assert row["test_acc_n"] == 0 and row["seeds"] == [] and row["not_completed"] == "1 diverged"


def test_nan_in_a_completed_run_is_left_out_of_n_and_named(sweep):
    folder = write_run(sweep / "nan", lambda_br=0.0, seed=3, summary={"test_acc": float("nan"), "val_acc": 0.9})
    runs = load.load_runs([sweep])
    row = tables.settings_table(runs.frame).iloc[0]
    assert row["test_acc_n"] == 3 and row["val_acc_n"] == 4
    assert row["test_acc_mean"] == pytest.approx(np.mean(ACCURACY[0.0]))
    assert f"{folder}/summary.json: completed, but test_acc is nan" in tables.footer(runs)


@pytest.mark.parametrize("text, reason", [("", "empty"), ('{"status": "comp', "not JSON"), ("[1]", "no summary")])
def test_a_damaged_summary_is_named_and_counted(sweep, text, reason):
    folder = write_run(sweep / "damaged", seed=7)
    (folder / "summary.json").write_text(text)
    runs = load.load_runs([sweep])
    assert [reason in problem and str(folder) in problem for problem in runs.problems] == [True]
    assert tables.settings_table(runs.frame).iloc[-1]["not_completed"] == "1 unreadable"


def test_a_run_without_a_readable_config_enters_no_mean(sweep):
    folder = write_run(sweep / "bare", summary={"test_acc": 0.1})
    (folder / ".hydra/config.yaml").write_text("a: [1")
    runs = load.load_runs([sweep])
    assert len(runs.frame) == 7
    assert tables.settings_table(runs.frame)["test_acc_n"].tolist() == [3, 3]
    assert f"In no row, settings unknown: {folder}" in tables.footer(runs)
    assert "not YAML" in tables.footer(runs)


def test_a_truncated_line_costs_that_line_only(tmp_path):
    folder = write_run(tmp_path / "0", epochs=3, summary={})
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 4, "train/l')
    lines = load.read_lines(path)
    assert lines.frame["epoch"].tolist() == [1, 2, 3]
    assert lines.problems == load.load_runs([tmp_path]).problems
    assert lines.problems == [f"{path}: 1 of 4 lines unreadable, skipped: 4"]


def test_an_epoch_written_again_after_a_resume_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"epoch": epoch, "train/ce": value} for epoch, value in [(1, 3.0), (2, 2.5), (2, 2.0), (3, 1.0)]]
    path.write_text("\n".join(map(json.dumps, rows)))
    lines = load.read_lines(path)
    assert lines.frame["train/ce"].tolist() == [3.0, 2.0, 1.0]
    assert "1 lines written again" in lines.problems[0]


@pytest.mark.parametrize("name", ["metrics.jsonl", "levels.jsonl"])
def test_missing_and_empty_files_are_named(tmp_path, name):
    folder = write_run(tmp_path / "0", summary={})
    (folder / name).write_text("")
    assert load.load_runs([tmp_path]).problems == [f"{folder / name}: empty"]
    (folder / name).unlink()
    assert load.load_runs([tmp_path]).problems == [f"{folder / name}: missing"]


def test_runs_are_found_once_in_counting_order(tmp_path):
    for number in (10, 2):
        write_run(tmp_path / f"a/{number}", summary={})
    (tmp_path / "a/2/wandb/offline").mkdir(parents=True)
    (tmp_path / "a/2/wandb/offline/summary.json").write_text("{}")
    assert load.find_runs([tmp_path / "a", tmp_path, tmp_path / "a/2"]) == [
        tmp_path / "a/2",
        tmp_path / "a/10",
    ]


def test_wandb_and_resume_are_no_settings_but_an_absent_key_is_a_difference(tmp_path):
    write_run(tmp_path / "0", summary={}, pretrained=None)
    write_run(tmp_path / "1", summary={})
    frame = load.load_runs([tmp_path]).frame
    assert tables.varying(frame) == ["config.pretrained"]
    assert [tables.show(value) for (value,), _ in tables.groups(frame)] == ["-", "null"]


def test_rows_are_ordered_by_size_with_words_last(tmp_path):
    for number, alpha_policy in enumerate([10, "frozen", 2, 9.5]):
        write_run(tmp_path / str(number), summary={}, alpha_policy=alpha_policy)
    assert [values for values, _ in tables.groups(load.load_runs([tmp_path]).frame)] == [
        (2,),
        (9.5,),
        (10,),
        ("frozen",),
    ]


def test_a_repeated_seed_is_pointed_out(sweep):
    write_run(sweep / "again", lambda_br=0.0, seed=0, summary={"test_acc": 0.95})
    runs = load.load_runs([sweep])
    assert tables.settings_table(runs.frame).iloc[0]["seeds"] == [0, 0, 1, 2]
    assert "Same settings and seed more than once" in tables.footer(runs)


def test_levels_are_averaged_over_the_sites_of_equal_bits(tmp_path):
    folder = write_run(tmp_path / "0")
    levels = load.read_lines(folder / "levels.jsonl").frame
    table = tables.levels_by_epoch(levels, ["effectiveness", "flip_rate"])
    row = table[(table["kind"] == "act") & (table["bits"] == 2) & (table["epoch"] == 6)].iloc[0]
    written = [json.loads(line) for line in (folder / "levels.jsonl").read_text().splitlines()]
    expected = [r["effectiveness"] for r in written if (r["kind"], r["bits"], r["epoch"]) == ("act", 2, 6)]
    assert row["sites"] == len(expected) == 2
    assert row["effectiveness_mean"] == pytest.approx(np.mean(expected))
    assert row["effectiveness_min"] == min(expected)
    assert table[table["epoch"] == 0]["flip_rate_mean"].isna().all()


def test_histograms_keep_counts_edges_and_the_order_of_the_net(tmp_path):
    histograms = load.read_histograms(write_run(tmp_path / "0"))
    assert list(histograms)[:3] == ["conv1.weight", "conv1.input", "layer1.0.conv1.weight"]
    assert sorted(histograms["conv1.input"].counts) == [0, 2, 6]
    assert all(counts.sum() == 4000 for h in histograms.values() for counts in h.counts.values())


@pytest.mark.parametrize(
    "bits, qn, qp, expected",
    [(2, -2, 1, [-2, -1, 0, 1]), (2, 0, 3, [0, 1, 2, 3]), (1, -1, 1, [-1, 1]), (1, 0, 1, [0, 1])],
)
@pytest.mark.parametrize("bars_per_step", [1, 20, 32])
def test_integer_levels_are_those_of_the_grid(bits, qn, qp, expected, bars_per_step):
    assert list(plots.integer_levels(edges_of(qn, qp, bars_per_step), bits)) == expected


def test_level_histograms_stand_before_br_and_at_the_end(tmp_path):
    figure = plots.level_histograms(write_run(tmp_path / "0"))
    assert [axes.get_title(loc="left") for axes in figure.axes][:2] == [
        "layer1.0.conv1.weight, 2 bit", "layer1.0.conv1.input, 2 bit",
    ]  # fmt: skip
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["epoch 2, before BR", "epoch 6, the end"]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [-2, -1, 0, 1]
    before = figure.axes[0].patches[0].get_data().values
    assert before.sum() == pytest.approx(100)


def test_learning_curves_draw_every_run_in_the_colour_of_its_label(sweep):
    folders = load.find_runs([sweep])
    figure = plots.learning_curves(folders, [folder.parts[-3] for folder in folders])
    accuracy = figure.axes[0]
    assert len(accuracy.lines) == 6
    assert len({line.get_color() for line in accuracy.lines}) == 2
    written = [json.loads(line)["val/acc"] for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), 100 * np.array(written))


def test_command_writes_table_csv_and_figures(sweep, capsys):
    (write_run(sweep / "late", seed=5) / "histograms.npz").write_bytes(b"PK damaged")
    assert main([str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert (sweep / "report/table.md").read_text().strip() == printed.strip()
    header, *lines = (sweep / "report/runs.csv").read_text().splitlines()
    assert header.startswith("config.regularizer.lambda_br,config.seed,status,") and header.endswith(",path")
    assert len(lines) == 7
    names = {path.name for path in (sweep / "report/figures").iterdir()}
    assert names == {
        "learning_curves.png",
        *(f"{kind}_2026-01-01__{lambda_br}__deep__0.png"
          for kind in ("level_histograms", "levels_over_epochs") for lambda_br in ACCURACY),
    }  # fmt: skip


def test_a_figure_without_its_data_costs_only_itself(tmp_path, capsys):
    folder = write_run(tmp_path / "only", summary={})
    (folder / "histograms.npz").write_bytes(b"PK damaged")
    (folder / "levels.jsonl").unlink()
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert "no figure level_histograms_only" in error and "no figure levels_over_epochs_only" in error
    assert [path.name for path in (tmp_path / "out/figures").iterdir()] == ["learning_curves.png"]


def test_no_run_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no run" in capsys.readouterr().err


def test_neither_torch_nor_brqat_is_imported():
    code = "import sys, multirun_analysis.__main__; sys.exit(bool({'torch', 'brqat'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
