"""multirun_analysis on synthetic run folders; every figure is recomputed here, from the numbers written."""

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from run_folders import edges_of, write_run

from multirun_analysis import load, plots, stats, tables
from multirun_analysis.__main__ import main

ACCURACY = {0.0: [0.951, 0.957, 0.949], 1.0: [0.981, 0.987, 0.9795]}  # lambda_br -> by seed


def runs_below(folder):
    return load.load_runs(load.find([folder]).runs)


def table_of(folder, by=None):
    frame = runs_below(folder).frame
    return tables.settings_table(frame, stats.keys_of(frame, by))


def notes_of(folder):
    runs = runs_below(folder)
    keys = stats.keys_of(runs.frame)
    return "\n".join(tables.notes(runs, tables.settings_table(runs.frame, keys), keys))


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
    table = table_of(sweep)
    assert list(table["config.regularizer.lambda_br"]) == [0.0, 1.0]
    for row, accuracies in zip(table.to_dict("records"), ACCURACY.values(), strict=True):
        assert row["seeds"] == [0, 1, 2]
        assert row["test_acc_n"] == 3
        assert row["test_acc_mean"] == pytest.approx(np.mean(accuracies))
        assert row["test_acc_sd"] == pytest.approx(scipy.stats.tstd(accuracies))  # tstd is ddof=1
        assert row["val_acc_mean"] == pytest.approx(np.mean(accuracies) + 0.004)
        assert row["seconds_sd"] == pytest.approx(scipy.stats.tstd([10, 11, 14]))


def test_markdown_shows_percent_with_one_decimal(sweep):
    text = tables.to_markdown(table_of(sweep))
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
    text = tables.to_markdown(table_of(tmp_path))
    assert "98.6 (n=1)" in text
    assert "+-" not in text and "nan" not in text


def test_only_completed_runs_enter_the_means(sweep):
    for seed, status in enumerate(["diverged", "pruned", "failed", "interrupted"], start=3):
        write_run(sweep / status, seed=seed, summary={"status": status, "test_acc": 0.1})
    write_run(sweep / "unfinished", seed=9)
    row = table_of(sweep).iloc[-1]
    assert row["test_acc_mean"] == pytest.approx(np.mean(ACCURACY[1.0]))
    assert row["seeds"] == [0, 1, 2]
    assert row["not_completed"] == "1 diverged, 1 failed, 1 interrupted, 1 pruned, 1 unfinished"
    assert "11 runs: 6 completed, 1 diverged, 1 failed" in notes_of(sweep)


def test_a_setting_with_no_completed_run_keeps_its_row(sweep):
    write_run(sweep / "strong", lambda_br=100.0, summary={"status": "diverged", "test_acc": float("nan")})
    row = table_of(sweep).iloc[-1]
    assert row["config.regularizer.lambda_br"] == 100.0
    assert row["test_acc_n"] == 0 and row["seeds"] == [] and row["not_completed"] == "1 diverged"


def test_nan_in_a_completed_run_is_left_out_of_n_and_named(sweep):
    folder = write_run(sweep / "nan", lambda_br=0.0, seed=3, summary={"test_acc": float("nan"), "val_acc": 0.9})
    row = table_of(sweep).iloc[0]
    assert row["test_acc_n"] == 3 and row["val_acc_n"] == 4
    assert row["test_acc_mean"] == pytest.approx(np.mean(ACCURACY[0.0]))
    assert f"{folder}/summary.json: completed, but test_acc is nan" in notes_of(sweep)


@pytest.mark.parametrize("text, reason", [("", "empty"), ('{"status": "comp', "not JSON"), ("[1]", "no summary")])
def test_a_damaged_summary_is_named_and_counted(sweep, text, reason):
    folder = write_run(sweep / "damaged", seed=7)
    (folder / "summary.json").write_text(text)
    runs = runs_below(sweep)
    assert [reason in problem and str(folder) in problem for problem in runs.problems] == [True]
    assert table_of(sweep).iloc[-1]["not_completed"] == "1 unreadable"


def test_a_run_without_a_readable_config_enters_no_mean(sweep):
    folder = write_run(sweep / "bare", summary={"test_acc": 0.1})
    (folder / ".hydra/config.yaml").write_text("a: [1")
    runs = runs_below(sweep)
    assert len(runs.frame) == 7
    assert table_of(sweep)["test_acc_n"].tolist() == [3, 3]
    assert f"In no row, settings unknown: {folder}" in notes_of(sweep)
    assert "not YAML" in notes_of(sweep)


def test_a_truncated_line_costs_that_line_only(tmp_path):
    folder = write_run(tmp_path / "0", epochs=3, summary={})
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"epoch": 4, "train/l')
    lines = load.read_lines(path)
    assert lines.frame["epoch"].tolist() == [1, 2, 3]
    assert lines.problems == runs_below(tmp_path).problems
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
    assert runs_below(tmp_path).problems == [f"{folder / name}: empty"]
    (folder / name).unlink()
    assert runs_below(tmp_path).problems == [f"{folder / name}: missing"]


def test_runs_are_found_once_in_counting_order(tmp_path):
    for number in (10, 2):
        write_run(tmp_path / f"a/{number}", summary={})
    (tmp_path / "a/2/wandb/offline").mkdir(parents=True)
    (tmp_path / "a/2/wandb/offline/summary.json").write_text("{}")
    assert load.find([tmp_path / "a", tmp_path, tmp_path / "a/2"]).runs == [
        tmp_path / "a/2",
        tmp_path / "a/10",
    ]


def settings_of(frame):
    return stats.settings(frame, stats.varying(frame))


def test_wandb_and_resume_are_no_settings_but_an_absent_key_is_a_difference(tmp_path):
    write_run(tmp_path / "0", summary={}, pretrained=None)
    write_run(tmp_path / "1", summary={})
    frame = runs_below(tmp_path).frame
    assert stats.varying(frame) == ["config.pretrained"]
    assert [tables.show(setting.values[0]) for setting in settings_of(frame)] == ["-", "null"]


def test_rows_are_ordered_by_size_with_words_last(tmp_path):
    for number, lr_scale in enumerate([10, "frozen", 2, 9.5]):
        write_run(tmp_path / str(number), summary={}, lr_scale=lr_scale)
    assert [setting.values for setting in settings_of(runs_below(tmp_path).frame)] == [(2,), (9.5,), (10,), ("frozen",)]


def test_a_run_with_the_settings_and_seed_of_another_is_counted_once_and_named(sweep):
    folder = write_run(sweep / "again", lambda_br=0.0, seed=0, summary={"test_acc": 0.5, "config_hash": "a"})
    row = table_of(sweep).iloc[0]
    assert (row["seeds"], row["test_acc_n"]) == ([0, 1, 2], 3)
    assert row["test_acc_mean"] == pytest.approx(np.mean(ACCURACY[0.0]))
    assert f"Not counted, since another run has the same settings and seed: {folder}" in notes_of(sweep)


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
    folder = write_run(tmp_path / "0")
    chart = plots.level_histograms(folder, "run", most_layers=4)
    assert [panel.title for panel in chart.panels][:2] == [
        "layer1.0.conv1.weight, 2 bit", "layer1.0.conv1.input, 2 bit",
    ]  # fmt: skip
    weights = chart.panels[0]
    assert [series.name for series in weights.series] == ["epoch 2, before BR", "epoch 6, the end"]
    assert [level for level, _ in weights.upright] == [-2, -1, 0, 1]
    assert sum(weights.series[0].y) == pytest.approx(100)
    assert len(plots.level_histograms(folder, "run").panels) == 6  # all layers, without a bound
    for series, epoch in zip(weights.series, (2, 6), strict=True):
        counts = np.load(folder / "histograms.npz")[f"layer1.0.conv1.weight@{epoch}"]
        np.testing.assert_allclose(np.array(series.y)[np.array(series.y) > 0], counts[counts > 0] / 40)


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_learning_curves_are_means_over_the_runs_of_a_name(sweep):
    folders = load.find([sweep]).runs
    chart = plots.learning_curves({"weak": folders[:3], "strong": folders[3:]})
    weak, strong = chart.panels[0].series
    assert (weak.name, strong.name) == ("weak", "strong") and weak.style != strong.style
    written = 100 * np.array(
        [[line["val/acc"] for line in lines_of(folder, "metrics.jsonl")] for folder in folders[:3]]
    )
    np.testing.assert_allclose(weak.y, written.mean(axis=0))
    np.testing.assert_allclose(weak.low, written.min(axis=0))
    np.testing.assert_allclose(weak.high, written.max(axis=0))


def test_levels_over_epochs_are_means_over_sites_and_runs(sweep):
    folders = load.find([sweep]).runs[3:]
    chart = plots.levels_over_epochs({"frozen": folders}, "weight", 2, "W2A2")
    panel = next(panel for panel in chart.panels if panel.y == "effectiveness (%)")
    last = [
        [line["effectiveness"] for line in lines_of(folder, "levels.jsonl")
         if (line["kind"], line["bits"], line["epoch"]) == ("weight", 2, 6)]
        for folder in folders
    ]  # fmt: skip
    assert panel.series[0].y[-1] == pytest.approx(np.mean(last))
    assert (panel.series[0].low[-1], panel.series[0].high[-1]) == (np.min(last), np.max(last))


def test_a_figure_without_its_data_costs_only_itself(tmp_path, capsys):
    folder = write_run(tmp_path / "only", summary={})
    (folder / "histograms.npz").write_bytes(b"PK damaged")
    (folder / "levels.jsonl").unlink()
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert "no figure level_histograms_W2A2" in error and "no figure levels_weight_W2A2" in error
    assert {path.name for path in (tmp_path / "out/figures").glob("[!.]*")} == {
        "learning_curves.png",
        "learning_curves.svg",
    }


def test_no_run_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no run" in capsys.readouterr().err


def test_neither_torch_nor_brqat_is_imported():
    code = "import sys, multirun_analysis.write; sys.exit(bool({'torch', 'brqat'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


# ---- samples, intervals, differences


@pytest.mark.parametrize("values", [[0.9, 0.91], [0.5, 0.6, 0.55, 0.52], list(np.random.default_rng(0).random(30))])
def test_interval_of_a_mean_is_scipys(values):
    found = stats.estimate([*values, None, float("nan"), "x"])
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert (found.n, found.mean, found.sd) == (
        len(values),
        pytest.approx(np.mean(values)),
        pytest.approx(np.std(values, ddof=1)),
    )
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_one_value_has_neither_spread_nor_interval_and_none_has_nothing():
    one, none = stats.estimate([0.9]), stats.estimate([])
    assert (one.mean, one.n) == (0.9, 1) and np.isnan([one.sd, one.low, one.high]).all()
    assert none.n == 0 and np.isnan([none.mean, none.sd, none.low, none.high]).all()


def test_interval_holds_the_mean_of_its_distribution_19_times_of_20():
    rng = np.random.default_rng(1)
    inside = [(e := stats.estimate(rng.normal(0.9, 0.01, 3))).low < 0.9 < e.high for _ in range(4000)]
    assert 0.935 < np.mean(inside) < 0.965


def test_difference_to_lambda_0_is_paired_by_seed_over_the_seeds_that_both_have(sweep):
    write_run(sweep / "more", lambda_br=1.0, seed=7, summary={"test_acc": 0.1})  # no control has this seed
    row = table_of(sweep).iloc[1]
    left, right = ACCURACY[1.0], ACCURACY[0.0]
    test = scipy.stats.ttest_rel(left, right)
    assert row["difference_n"] == 3 and row["test_acc_n"] == 4 and row["control"] == 0
    assert row["difference_mean"] == pytest.approx(np.mean(np.subtract(left, right)))
    low, high = test.confidence_interval(0.95)
    assert (row["difference_low"], row["difference_high"]) == (pytest.approx(low), pytest.approx(high))


def test_gap_is_to_the_float_network_of_the_same_run(tmp_path):
    pairs = [(0.9, 0.95), (0.92, 0.91), (0.8, None)]
    for seed, (test, base) in enumerate(pairs):
        write_run(tmp_path / str(seed), seed=seed, summary={"test_acc": test, "float_test_acc": base})
    row = table_of(tmp_path).iloc[0]
    gaps = [0.9 - 0.95, 0.92 - 0.91]
    assert (row["gap_n"], row["gap_mean"], row["gap_sd"]) == (
        2,
        pytest.approx(np.mean(gaps)),
        pytest.approx(np.std(gaps, ddof=1)),
    )


def test_control_agrees_in_everything_but_the_regularizer(tmp_path):
    accuracies = {}
    for number, (bits, strength, policy) in enumerate(
        [
            (2, 0, "learnable"),
            (2, 0, "frozen"),
            (4, 0, "learnable"),
            (2, 5, "frozen"),
            (2, 5, "backprop"),
            (4, 5, "frozen"),
        ]
    ):
        accuracies[bits, strength, policy] = 0.9 - 0.01 * number
        summary = {"test_acc": accuracies[bits, strength, policy]}
        write_run(tmp_path / str(number), bits=bits, lambda_br=strength, policy=policy, summary=summary)
    table = table_of(tmp_path)
    rows = {(row["weight_bits"], row["lambda_br"], row["policy"]): row for row in table.to_dict("records")}
    of = {name: rows[name]["control"] and table.loc[rows[name]["control"], "policy"] for name in rows}
    assert of[2, 5, "frozen"] == "frozen"
    assert of[2, 5, "backprop"] == "learnable"  # without BR no gradient of BR reaches alpha
    assert of[4, 5, "frozen"] is None and of[2, 0, "frozen"] is None
    assert rows[2, 5, "backprop"]["difference_mean"] == pytest.approx(accuracies[2, 5, "backprop"] - 0.9)


def test_a_run_without_a_regularizer_is_a_control(tmp_path):
    write_run(tmp_path / "0", summary={}, regularizer={"_target_": "brqat.regularizer.none.NoRegularizer"})
    write_run(tmp_path / "1", summary={"test_acc": 0.95}, lambda_br=2.0)
    table = table_of(tmp_path)
    assert sorted(table["is_control"]) == [False, True]
    row = table[~table["is_control"].astype(bool)].iloc[0]
    assert row["difference_mean"] == pytest.approx(0.05) and row["difference_n"] == 1


def test_control_with_runs_in_common_goes_before_one_of_the_same_policy_without(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"a{seed}", lambda_br=0, policy="learnable", seed=seed, summary={"test_acc": 0.9})
        write_run(tmp_path / f"b{seed}", lambda_br=5.0, policy="backprop", seed=seed, summary={"test_acc": 0.92})
    write_run(tmp_path / "c", lambda_br=0, policy="backprop", summary={"status": "failed", "test_acc": None})
    rows = table_of(tmp_path).to_dict("records")
    row = next(row for row in rows if row["lambda_br"] == 5)
    assert row["difference_n"] == 3 and rows[row["control"]]["policy"] == "learnable"


@pytest.mark.parametrize(
    "regularizer",
    [
        {"_target_": "mine.Regularizer", "strength": 3},
        {"_target_": "brqat.regularizer.binreg.BinReg", "lambda_br": 0, "lambda_br_act": "${mine}"},
        {"_target_": "brqat.regularizer.binreg.BinReg", "lambda_br": float("inf"), "lambda_br_act": 0},
    ],
    ids=["of another kind", "not resolved", "not finite"],
)
def test_regularizer_that_is_not_known_to_be_off_makes_no_control(tmp_path, regularizer):
    write_run(tmp_path / "0", summary={}, regularizer=regularizer)
    assert not table_of(tmp_path)["is_control"].any()


def test_of_two_runs_with_one_seed_that_with_figures_counts(tmp_path):
    write_run(tmp_path / "0", summary={"test_acc": None})
    write_run(tmp_path / "1", summary={"test_acc": 0.75})
    row = table_of(tmp_path).iloc[0]
    assert (row["test_acc_n"], row["test_acc_mean"]) == (1, 0.75)


def test_runs_without_a_seed_are_samples_of_their_own_and_never_paired(tmp_path):
    for number in range(4):
        run = write_run(tmp_path / str(number), lambda_br=number % 2, summary={"test_acc": 0.9 + 0.01 * number})
        config = (run / ".hydra/config.yaml").read_text().replace("seed: 0\n", "")
        (run / ".hydra/config.yaml").write_text(config)
    write_run(tmp_path / "with", lambda_br=1, summary={"test_acc": 0.5})
    rows = table_of(tmp_path).to_dict("records")
    assert [row["test_acc_n"] for row in rows] == [2, 3] and rows[1]["difference_n"] == 0


def test_summary_cannot_change_what_the_config_says(tmp_path):
    write_run(tmp_path / "0", seed=2, summary={"config": {"seed": 7, "regularizer": {"lambda_br": 99}}})
    frame = runs_below(tmp_path).frame
    assert frame["config.seed"][0] == 2 and frame["config.regularizer.lambda_br"][0] == 1.0


def test_linked_runs_are_found_once_even_where_a_link_leads_back(tmp_path):
    write_run(tmp_path / "real/0", summary={})
    (tmp_path / "links").mkdir()
    (tmp_path / "links/0").symlink_to(tmp_path / "real/0")
    (tmp_path / "links/back").symlink_to(tmp_path)
    assert len(load.find([tmp_path / "links"]).runs) == len(load.find([tmp_path]).runs) == 1


def test_keys_can_be_given_and_then_average_over_the_rest(sweep, capsys):
    row = table_of(sweep, ["quantizer.bits"]).iloc[0]
    by_seed = np.mean([ACCURACY[0.0], ACCURACY[1.0]], axis=0)  # a seed is one sample, whatever else its runs differ in
    assert (row["test_acc_n"], row["test_acc_mean"]) == (3, pytest.approx(np.mean(by_seed)))
    assert row["test_acc_sd"] == pytest.approx(np.std(by_seed, ddof=1))
    notes = "\n".join(tables.notes(runs_below(sweep), table_of(sweep, ["quantizer.bits"]), ["config.quantizer.bits"]))
    assert "Averaged over within a seed, though the runs differ in it: regularizer.lambda_br" in notes
    assert main([str(sweep), "--by", "lambda_bar"]) == 2
    assert "--by lambda_bar: no run has this key" in capsys.readouterr().err


def test_one_column_names_the_policy_where_weights_and_activations_share_it(tmp_path):
    write_run(tmp_path / "0", policy="frozen", summary={})
    write_run(tmp_path / "1", policy="learnable", summary={})
    table = table_of(tmp_path)
    assert list(table["config.alpha_policy"]) == ["frozen", "learnable"] and "config.alpha_policy.act" not in table
    write_run(tmp_path / "2", summary={}, alpha_policy={"weight": "frozen", "act": "learnable"})
    assert list(table_of(tmp_path)["config.alpha_policy.act"]) == ["frozen", "learnable", "learnable"]


def test_front_holds_what_nothing_smaller_beats():
    points = [(3, 0.9), (1, 0.8), (2, 0.7), (3, 0.95), (4, 0.95), (1, 0.6)]
    assert stats.front(points) == [1, 3]
    assert stats.front([]) == []


# ---- the cache


def test_second_call_reads_only_what_changed(sweep, tmp_path_factory, monkeypatch):
    cache, folders = tmp_path_factory.mktemp("cache") / "c.sqlite", load.find([sweep]).runs
    first = load.load_runs(folders, cache)
    read = []
    monkeypatch.setattr(load, "read_run", lambda folder, real=load.read_run: (read.append(folder), real(folder))[1])
    assert load.load_runs(folders, cache).frame.equals(first.frame) and not read
    path = folders[1] / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_acc": 0.25}))
    (folders[2] / "levels.jsonl").write_text("")
    again = load.load_runs(folders, cache)
    assert read == [folders[1], folders[2]]
    assert again.frame["test_acc"][1] == 0.25 and again.problems == [f"{folders[2]}/levels.jsonl: empty"]
    assert load.load_runs(folders, cache).problems == again.problems  # what was wrong is kept, too


def test_cache_with_a_damaged_row_reads_that_run_again(sweep, tmp_path_factory):
    cache, folders = tmp_path_factory.mktemp("cache") / "c.sqlite", load.find([sweep]).runs
    first = load.load_runs(folders, cache)
    with sqlite3.connect(cache) as rows:
        rows.execute("UPDATE runs SET row = '{' WHERE rowid = 2")
    assert load.load_runs(folders, cache).frame.equals(first.frame)
    with sqlite3.connect(cache) as rows:
        rows.execute("DROP TABLE runs")
    assert load.load_runs(folders, cache).frame.equals(first.frame)


def test_cache_that_is_locked_is_done_without(sweep, tmp_path_factory, monkeypatch):
    cache, folders = tmp_path_factory.mktemp("cache") / "c.sqlite", load.find([sweep]).runs
    first = load.load_runs(folders, cache)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **more: connect(*given, **(more | {"timeout": 0.1})))
    with connect(cache) as rows:
        rows.execute("BEGIN EXCLUSIVE")
        assert load.load_runs(folders, cache).frame.equals(first.frame)


@pytest.mark.parametrize("damage", [b"no database", b""])
def test_damaged_cache_is_begun_anew(sweep, tmp_path_factory, damage):
    cache, folders = tmp_path_factory.mktemp("cache") / "c.sqlite", load.find([sweep]).runs
    first = load.load_runs(folders, cache)
    cache.write_bytes(damage)
    assert load.load_runs(folders, cache).frame.equals(first.frame)


# ---- other forms of a table


def test_latex_has_the_rows_of_markdown_and_no_bare_special_character(sweep):
    table = table_of(sweep)
    text = tables.to_latex(table, ["50 % of_all"])
    assert text.startswith("% 50 % of_all") and text.count(r"\\") == 1 + len(table)
    assert r"regularizer.lambda\_br" in text and r"test\_acc \%" in text and r"$\pm$" in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert not re.search(r"(?<!\\)[%_&#]", text.split("\n", 1)[1].replace(" & ", ""))


def test_parquet_holds_the_runs_with_types(sweep):
    frame = runs_below(sweep).frame
    each = tables.runs_table(frame, stats.varying(frame))
    tables.typed(each).to_parquet(sweep / "runs.parquet")
    back = pd.read_parquet(sweep / "runs.parquet")
    assert list(back) == list(each) and back["test_acc"].tolist() == frame["test_acc"].tolist()
    assert str(back["config.seed"].dtype) == "Int64" and back["config.seed"].tolist() == frame["config.seed"].tolist()


def test_column_of_several_types_becomes_text():
    mixed = pd.DataFrame({"bits": [2, "float", None], "on": [True, False, None], "x": [1, 2.5, None]}, dtype=object)
    typed = tables.typed(mixed)
    assert typed["bits"].tolist()[:2] == ["2", "float"] and typed["bits"].isna().tolist() == [False, False, True]
    assert typed["on"].tolist()[:2] == [True, False] and typed["x"].tolist()[:2] == [1, 2.5]
