"""The report, from run folders to a page in a browser: figures against scipy on the summaries, words, use."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest
import scipy.stats
from run_folders import write_run

from multirun_analysis import load, plots, stats, study, tables
from multirun_analysis.__main__ import main
from multirun_analysis.answers import answers, best_of, missing
from multirun_analysis.report import what_br_did

BITS, LAMBDAS, FEW, SEEDS = (2, 3, 4), (0, 0.1, 1.0, 10.0), ("frozen", "learnable"), (0, 1, 2)


def accuracy(bits, strength, policy, seed):
    """Of a run: something that differs by everything, the same whenever asked."""
    rng = np.random.default_rng([bits, round(10 * strength), len(policy), seed])
    return 0.9 + 0.02 * bits + 0.004 * min(strength, 1) + 0.004 * rng.random()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """3 bit-widths, 4 lambdas, 2 policies, 3 seeds; a diverged run; a study beside them."""
    folder = tmp_path_factory.mktemp("sweep")
    for bits in BITS:
        for strength in LAMBDAS:
            for policy in FEW:
                for seed in SEEDS:
                    test = accuracy(bits, strength, policy, seed)
                    summary = {
                        "test_acc": test, "val_acc": test + 0.002, "float_test_acc": 0.99 + 0.001 * seed,
                        "config_hash": f"{bits}{strength}{policy}{seed}", "git_sha": "abc", "wandb_run_id": "w1",
                    }  # fmt: skip
                    write_run(folder / f"{bits}/{strength}/{policy}{seed}", bits=bits, lambda_br=strength,
                              policy=policy, seed=seed, summary=summary)  # fmt: skip
    write_run(folder / "away", bits=2, lambda_br=10.0, seed=5, summary={"status": "diverged", "test_acc": None})
    make_study(folder / "study.db")
    return folder


def make_study(file):
    """As hydra/sweeper=study leaves one: a control, whose lambda lies outside of the space, and trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(study_name="s", storage=f"sqlite:///{file}", direction="maximize")
    made.set_user_attr("description", {"objective": "val_acc (maximize)"})
    made.enqueue_trial({}, user_attrs={"control": True, "setting": {"quantizer.bits": 2, "regularizer.lambda_br": 0}})
    for number in range(12):
        trial = made.ask()
        if number:
            bits = trial.suggest_categorical("quantizer.bits", [2, 4])
            strength = trial.suggest_float("regularizer.lambda_br", 0.01, 100, log=True)
            trial.set_user_attr("setting", {"quantizer.bits": bits, "regularizer.lambda_br": strength})
        status = "diverged" if number == 5 else "completed"
        trial.set_user_attr("run", {"status": status})
        made.tell(trial, 0.0 if number == 5 else 0.9 + 0.001 * number * (1 if number % 2 else 0.5))


@pytest.fixture(scope="module")
def report(sweep, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report"
    assert main([str(sweep), "--out", str(out)]) == 0
    return out


class Page(HTMLParser):
    """What of a page the tests look at."""

    def __init__(self, file):
        super().__init__()
        self.words, self.attributes, self.inside = [], [], []
        self.data = None
        self.feed(file.read_text(encoding="utf-8"))
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        self.inside = [tag, dict(attrs)]

    def handle_endtag(self, tag):
        self.inside = []

    def handle_data(self, data):
        if self.inside[:1] == ["script"]:
            if self.inside[1].get("id") == "data":
                self.data = json.loads(data)
            return
        if self.inside[:1] != ["style"]:
            self.words.append(data)


@pytest.fixture(scope="module")
def page(report):
    return Page(report / "index.html")


@pytest.fixture(scope="module")
def summaries(sweep):
    """(bits, lambda, policy) -> seed -> summary, read again without the code under test."""
    found = {}
    for bits in BITS:
        for strength in LAMBDAS:
            for policy in FEW:
                for seed in SEEDS:
                    text = (sweep / f"{bits}/{strength}/{policy}{seed}/summary.json").read_text()
                    found.setdefault((bits, strength, policy), {})[seed] = json.loads(text)
    return found


# ---- its figures


def test_command_leaves_its_files(report):
    names = {path.name for path in report.iterdir()}
    assert {"index.html", "runs.csv", "runs.parquet", "table.md", "table.tex", "figures"} <= names
    assert not list(report.rglob("*.tmp"))
    pngs = {path.stem for path in (report / "figures").glob("*.png")}
    assert pngs == {path.stem for path in (report / "figures").glob("*.svg")}
    assert {"accuracy_against_lambda", "pareto", "learning_curves"} <= pngs
    for bits in ("W2A2", "W3A3", "W4A4"):
        assert {f"{what}_{bits}" for what in ("levels_weight", "levels_act", "level_histograms")} <= pngs
    assert {f"study_{what}_s" for what in ("history", "importances", "slices", "parallel")} <= pngs


def cells_of(values, sign=""):
    """mean +- sd (n) and the interval, by scipy."""
    values = 100 * np.array(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, values.mean(), scipy.stats.sem(values))
    return (
        f"{values.mean():{sign}.1f} +- {values.std(ddof=1):.1f} (n={len(values)})",
        f"[{low:{sign}.1f}, {high:{sign}.1f}]",
    )


def test_every_row_of_the_table_agrees_with_the_summaries(page, report, summaries):
    settings = page.data["settings"]
    head = settings["head"]
    assert len(settings["rows"]) == len(summaries)  # the diverged run shares a setting with others
    for row in settings["rows"]:
        text = dict(zip(head, (cell[0] for cell in row), strict=True))
        key = (int(text["quantizer.bits"]), float(text["regularizer.lambda_br"]), text["alpha_policy"])
        runs = summaries[key]
        for name in ("test_acc", "val_acc", "float_test_acc"):
            spread, interval = cells_of([runs[seed][name] for seed in SEEDS])
            assert text[f"{name} %"] == (f"{spread} {interval}" if name == "test_acc" else spread)
        gaps = [runs[seed]["test_acc"] - runs[seed]["float_test_acc"] for seed in SEEDS]
        assert text["gap to float"] == cells_of(gaps, "+")[0]
        if key[1] == 0:
            assert text["vs lambda 0"] == "control"
        else:
            control = summaries[key[0], 0, key[2]]
            ours, theirs = ([part[seed]["test_acc"] for seed in SEEDS] for part in (runs, control))
            low, high = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
            spread, _ = cells_of(np.subtract(ours, theirs), "+")
            assert text["vs lambda 0"] == f"{spread} [{100 * low:+.1f}, {100 * high:+.1f}]"
        assert text["weight_bytes"] == f"{1000 * key[0]:,}" and text["bops"] == f"{10000 * key[0] ** 2:,}"
        assert text["not completed"] == ("1 diverged" if key == (2, 10, "learnable") else "-")
        assert row[head.index("test_acc %")][1] == pytest.approx(np.mean([runs[s]["test_acc"] for s in SEEDS]))


def test_accuracy_against_lambda_is_drawn_where_the_summaries_say(sweep, summaries):
    frame = load.load_runs(load.find([sweep]).runs).frame
    chart = plots.accuracy_against_lambda(tables.settings_table(frame, stats.keys_of(frame)))
    assert [panel.title for panel in chart.panels] == ["W2A2", "W3A3", "W4A4"]
    for panel, bits in zip(chart.panels, BITS, strict=True):
        zero = next(x for x, text in panel.ticks.items() if text == "0")
        assert 0 < zero < 0.1
        for series, policy in zip(panel.series, FEW, strict=True):
            assert series.name == f"alpha {policy}" and list(series.x) == [zero, 0.1, 1.0, 10.0]
            for place, strength in enumerate(LAMBDAS):
                values = [100 * summaries[bits, strength, policy][seed]["test_acc"] for seed in SEEDS]
                low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
                assert series.y[place] == pytest.approx(np.mean(values))
                assert series.low[place] == pytest.approx(low) and series.high[place] == pytest.approx(min(high, 100))


def test_front_joins_the_best_of_each_size(sweep, summaries):
    frame = load.load_runs(load.find([sweep]).runs).frame
    chart = plots.pareto(tables.settings_table(frame, stats.keys_of(frame)))
    line = next(series for series in chart.panels[0].series if series.kind == "line")
    best = [
        max(np.mean([runs[seed]["test_acc"] for seed in SEEDS]) for key, runs in summaries.items() if key[0] == bits)
        for bits in BITS
    ]
    assert list(line.x) == [1000 * bits for bits in BITS] and line.y == pytest.approx([100 * value for value in best])


def test_screen_shows_what_paper_prints(page, sweep):
    frame = load.load_runs(load.find([sweep]).runs).frame
    chart = plots.accuracy_against_lambda(tables.settings_table(frame, stats.keys_of(frame)))
    places = [int(attrs["data-figure"]) for _, attrs in page.attributes if "data-figure" in attrs]
    assert places == list(range(len(page.data["figures"])))
    figure = page.data["figures"][0]
    assert figure["data"][0]["y"] == pytest.approx(chart.panels[0].series[0].y)
    from multirun_analysis import paper

    printed = paper.drawn(chart).axes[0].containers[0].lines[0]
    np.testing.assert_allclose(printed.get_ydata(), chart.panels[0].series[0].y)


# ---- its words


def test_answer_is_the_setting_that_validation_prefers(page, summaries):
    for bits in BITS:
        of_width = {key: runs for key, runs in summaries.items() if key[0] == bits}
        best = max(of_width, key=lambda key: np.mean([of_width[key][seed]["val_acc"] for seed in SEEDS]))
        values = [of_width[best][seed]["test_acc"] for seed in SEEDS]
        assert f"W{bits}A{bits}: {100 * np.mean(values):.1f} +- {100 * np.std(values, ddof=1):.1f} % (n=3)" in page.text
        said = f"alpha_policy={best[2]} regularizer.lambda_br={best[1]:g}"
        assert f"quantizer.bits={bits} {said}" in page.text


def test_page_needs_nothing_from_elsewhere_and_has_words_for_its_pictures(page):
    addresses = [
        a for tag, a in page.attributes if tag in ("script", "link", "img") for a in (a.get("src"), a.get("href"))
    ]
    assert [address for address in addresses if address] == ["data:,"]
    labels = [attrs["aria-label"] for _, attrs in page.attributes if attrs.get("role") == "img"]
    assert labels and all(len(label) > 40 for label in labels)
    assert "1 diverged" in page.text and "abc (72 runs)" in page.text


def test_links_lead_to_the_runs_and_to_the_figures_for_print(page, report):
    for row in page.data["runs"]["rows"]:
        assert (report / row[0][2] / "summary.json").is_file()
    printed = [a["href"] for tag, a in page.attributes if tag == "a" and a["href"].startswith("figures/")]
    assert printed and all((report / href).is_file() for href in printed)


def words_of(folder, studies=()):
    runs = load.load_runs(load.find([folder]).runs)
    table = tables.settings_table(runs.frame, stats.keys_of(runs.frame))
    return " ".join(map(str, answers(table))), " ".join(missing(runs, table, studies))


def test_what_is_missing_is_said(tmp_path):
    write_run(tmp_path / "0", lambda_br=1.0, summary={"float_test_acc": None, "study_name": "gone"})
    write_run(tmp_path / "1", lambda_br=2.0, summary={"float_test_acc": None, "status": "pruned", "test_acc": None})
    said, lacks = words_of(tmp_path)
    assert "One seed only" in said and "No lambda=0 arm" in said
    for words in (
        "One seed only, in every setting",
        "No lambda=0 arm",
        "No float accuracy",
        "1 run pruned",
        "study gone",
    ):
        assert words in lacks
    assert "+-" not in said


def test_interval_that_holds_0_is_no_difference_and_one_that_does_not_is(tmp_path):
    for name, shift in (("same", 0.0), ("better", 0.05), ("worse", -0.05)):
        for seed in SEEDS:
            noise = 0.001 * (seed - 1)
            write_run(tmp_path / name / f"a{seed}", lambda_br=0, seed=seed, summary={"test_acc": 0.9, "val_acc": 0.5})
            summary = {"test_acc": 0.9 + shift + noise, "val_acc": 0.9}
            write_run(tmp_path / name / f"b{seed}", lambda_br=1.0, seed=seed, summary=summary)
    assert "it holds 0" in words_of(tmp_path / "same")[0]
    assert "better with regularization" in words_of(tmp_path / "better")[0]
    assert "worse with regularization" in words_of(tmp_path / "worse")[0]


def test_control_that_is_best_only_for_having_more_seeds_is_not_said_to_be_better(tmp_path):
    for seed in SEEDS:
        write_run(tmp_path / f"a{seed}", lambda_br=0, seed=seed, summary={"val_acc": 0.9})
    write_run(tmp_path / "b", lambda_br=2.0, summary={"val_acc": 0.99})
    assert "1 regularized setting with one seed has higher validation accuracy" in words_of(tmp_path)[0]


def test_control_alone_or_without_a_seed_in_common_is_told_from_none(tmp_path):
    write_run(tmp_path / "a/0", lambda_br=0, summary={})
    assert "nothing else was tried" in words_of(tmp_path / "a")[0]
    write_run(tmp_path / "b/0", lambda_br=0, seed=0, summary={"val_acc": 0.1})
    write_run(tmp_path / "b/1", lambda_br=1.0, seed=1, summary={"val_acc": 0.9})
    said, lacks = words_of(tmp_path / "b")
    assert "no completed run with a seed of this setting" in said and "No lambda=0 arm" not in said + lacks


def test_data_sets_do_not_compete(tmp_path):
    for number, name in enumerate(("digits", "cifar10")):
        dataset = {"_target_": f"brqat.dataset.{name}.load"}
        write_run(tmp_path / name, summary={"test_acc": 0.9 - 0.3 * number}, dataset=dataset)
    said, _ = words_of(tmp_path)
    assert "W2A2 on digits:" in said and "W2A2 on cifar10:" in said


def test_runs_that_say_nothing_of_their_bits_have_an_answer(tmp_path):
    write_run(tmp_path / "0", summary={"weight_bits": None, "act_bits": None})
    assert "bits not recorded: " in words_of(tmp_path)[0]


def test_several_widths_in_one_row_are_not_called_by_the_name_of_one(tmp_path):
    for bits in (2, 4):
        write_run(tmp_path / f"{bits}", bits=bits, summary={"test_acc": 0.2 * bits})
    frame = load.load_runs(load.find([tmp_path]).runs).frame
    table = tables.settings_table(frame, stats.keys_of(frame, ["regularizer.lambda_br"]))
    assert list(table["bits"]) == ["several bit-widths"] and table["test_acc_n"][0] == 1  # one seed
    assert "+-" not in tables.to_markdown(table)


def test_best_of_several_that_looks_better_is_to_be_confirmed(page, tmp_path):
    assert "looks better than it is: confirm it" in page.text
    for seed in SEEDS:
        write_run(tmp_path / f"a{seed}", lambda_br=0, seed=seed, summary={"test_acc": 0.8, "val_acc": 0.5})
        summary = {"test_acc": 0.9 + 0.001 * seed, "val_acc": 0.9}
        write_run(tmp_path / f"b{seed}", lambda_br=1.0, seed=seed, summary=summary)
    assert "looks better than it is" not in words_of(tmp_path)[0]


def test_answer_says_what_the_regularizer_did_to_the_levels(page, sweep):
    frame = load.load_runs(load.find([sweep / "2"]).runs).frame
    table = tables.settings_table(frame, stats.keys_of(frame))
    best = table.loc[best_of(table, "W2A2", regularized=True)]

    def mean(paths, epoch):
        rows = [json.loads(line) for path in paths for line in (Path(path) / "levels.jsonl").read_text().splitlines()]
        of = [row["effectiveness"] for row in rows if (row["kind"], row["bits"], row["epoch"]) == ("weight", 2, epoch)]
        return np.mean(of)

    control = table.loc[best["control"], "paths"]
    assert (
        f"effectiveness {mean(best['paths'], 2):.1f} after warmup, {mean(best['paths'], 6):.1f} at the end "
        f"({mean(control, 6):.1f} under lambda 0)" in page.text
    )
    assert f"best regularized setting (lambda {best['lambda_br']:g}), on average over layers: " in page.text


def test_settings_that_average_over_lambda_are_compared_with_nothing(sweep):
    frame = load.load_runs(load.find([sweep]).runs).frame
    table = tables.settings_table(frame, stats.keys_of(frame, ["quantizer.bits"]))
    assert not table["difference_n"].any() and list(table["seeds"]) == [[0, 1, 2]] * 3
    said = " ".join(map(str, answers(table)))
    assert said.count("Its runs differ in lambda") == 3 and not what_br_did(table)
    assert "lambda=0" not in " ".join(missing(load.Runs(frame, []), table, []))


def test_only_setting_that_completed_is_known_by_what_the_others_have(tmp_path):
    write_run(tmp_path / "0", lambda_br=0, summary={})
    write_run(tmp_path / "1", lambda_br=1.0, summary={"status": "diverged", "test_acc": None, "val_acc": None})
    assert "regularizer.lambda_br=0" in words_of(tmp_path)[0]


def test_front_is_one_of_each_data_set_and_says_whom_it_leaves_out(tmp_path):
    for number, (name, bits, test) in enumerate((("digits", 2, 0.99), ("cifar10", 2, 0.5), ("cifar10", 4, 0.6))):
        for seed in range(2):
            dataset = {"_target_": f"brqat.dataset.{name}.load"}
            write_run(tmp_path / f"{number}{seed}", bits=bits, seed=seed, summary={"test_acc": test}, dataset=dataset)
    frame = load.load_runs(load.find([tmp_path]).runs).frame
    chart = plots.pareto(tables.settings_table(frame, stats.keys_of(frame)))
    fronts = [series.y for series in chart.panels[0].series if series.kind == "line"]
    assert sorted(len(y) for y in fronts) == [1, 2] and "several seeds" not in chart.title
    write_run(tmp_path / "one", bits=3, summary={"test_acc": 0.995}, dataset={"_target_": "brqat.dataset.digits.load"})
    frame = load.load_runs(load.find([tmp_path]).runs).frame
    assert "among those with several seeds" in plots.pareto(tables.settings_table(frame, stats.keys_of(frame))).title


def test_setting_with_activations_regularized_alone_is_not_drawn_at_lambda_0_only(tmp_path):
    for number, (weight, act) in enumerate(((0, 0), (0, 0.1), (1.0, 0.1))):
        regularizer = {"_target_": "brqat.regularizer.binreg.BinReg", "lambda_br": weight, "lambda_br_act": act}
        write_run(tmp_path / f"{number}", summary={}, regularizer=regularizer)
    frame = load.load_runs(load.find([tmp_path]).runs).frame
    chart = plots.accuracy_against_lambda(tables.settings_table(frame, stats.keys_of(frame)))
    assert len(chart.panels) == 2


def test_one_lucky_seed_does_not_beat_a_setting_with_several(tmp_path):
    for seed in SEEDS:
        write_run(tmp_path / f"a{seed}", lambda_br=1.0, seed=seed, summary={"val_acc": 0.9})
    write_run(tmp_path / "b", lambda_br=2.0, summary={"val_acc": 0.99})
    assert "regularizer.lambda_br=1:" in words_of(tmp_path)[0]


# ---- studies


def test_importances_are_optunas_without_controls_and_diverged_trials(sweep):
    found, problems = study.read_studies([sweep / "study.db"])
    assert not problems and found[0].objectives == [("val_acc", "maximize")]
    trials = optuna.load_study(study_name="s", storage=f"sqlite:///{sweep}/study.db").get_trials()
    alone = optuna.create_study(direction="maximize")
    alone.add_trials([trial for trial in trials if trial.number not in (0, 5)])
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    assert found[0].importances == pytest.approx(optuna.importance.get_param_importances(alone, evaluator=evaluator))


def test_history_leaves_out_what_was_not_measured(sweep):
    (one,), _ = study.read_studies([sweep / "study.db"])
    best, trials, controls = plots.study_history(one).panels[0].series
    assert list(controls.x) == [0] and 5 not in trials.x and len(trials.x) == 10
    assert list(best.y) == list(np.maximum.accumulate(best.y))


def test_study_under_a_folder_with_any_name_is_read_and_nothing_is_created(sweep, tmp_path):
    for name in ("a#b", "a?b", "a%41b"):
        (tmp_path / name).mkdir()
        shutil.copy(sweep / "study.db", tmp_path / name)
        (found,), problems = study.read_studies([tmp_path / name / "study.db"])
        assert found.name == "s" and not problems
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a#b", "a%41b", "a?b"]


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:s3cret@127.0.0.1:1/none",
        "postgresql://127.0.0.1:1/none?user=me&password=s3cret",
        "postgresql:/me:s3cret@127.0.0.1:1/none",
        "postgresql://me:a@s3cret@127.0.0.1:1/none",
    ],
)
def test_password_of_a_database_is_not_shown(tmp_path, capsys, address):
    write_run(tmp_path / "0", summary={})
    assert main([str(tmp_path), "--no-figures", "--storage", address]) == 0
    printed, report = capsys.readouterr(), tmp_path / "report"
    written = "".join((report / name).read_text() for name in ("table.md", "table.tex", "index.html"))
    assert "no study could be read" in written and "***" in written
    assert "s3cret" not in written + printed.out + printed.err


def test_studies_of_one_name_have_figures_of_their_own(sweep, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        shutil.copy(sweep / "study.db", tmp_path / name)
    write_run(tmp_path / "run", summary={})
    assert main([str(tmp_path)]) == 0
    assert {"study_history_s.png", "study_history_s_2.png"} <= {p.name for p in (tmp_path / "report/figures").iterdir()}


def test_study_that_cannot_be_read_costs_only_itself(tmp_path, capsys):
    write_run(tmp_path / "0", summary={"study_name": "lost"})
    (tmp_path / "study.db").write_text("no database at all, but long enough to look at")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/study.journal").write_text('{"op_code": 0, "worker')
    assert main([str(tmp_path), "--no-figures", "--storage", "postgresql://nobody@127.0.0.1:1/none"]) == 0
    text = Page(tmp_path / "report/index.html").text
    for name in ("study.db: no study could be read", "postgresql://nobody@127.0.0.1:1/none: no study could be read"):
        assert name in text
    assert "The storage of study lost was not found" in text


# ---- damage


def test_damaged_input_gives_a_report_that_says_so(sweep, tmp_path, capsys):
    for number in range(8):
        shutil.copytree(
            sweep / f"2/{[0, 1.0][number % 2]}/frozen{number % 3}", tmp_path / f"{number}", dirs_exist_ok=True
        )
    (tmp_path / "0/metrics.jsonl").write_text((tmp_path / "0/metrics.jsonl").read_text()[:-20])
    (tmp_path / "1/levels.jsonl").write_text("")
    (tmp_path / "2/summary.json").unlink()
    summary = json.loads((tmp_path / "3/summary.json").read_text())
    (tmp_path / "3/summary.json").write_text(json.dumps(summary | {"test_acc": float("nan")}))
    (tmp_path / "4/.hydra/config.yaml").write_text("a: [")
    (tmp_path / "5/summary.json").write_text('{"status": "comp')
    (tmp_path / "5/histograms.npz").write_bytes(b"PK")
    assert main([str(tmp_path)]) == 0
    page = Page(tmp_path / "report/index.html")
    for words in (
        "0/metrics.jsonl: 1 of 6 lines unreadable", "1/levels.jsonl: empty", "1 run unfinished",
        "3/summary.json: completed, but test_acc is nan", "4/.hydra/config.yaml: not YAML", "1 run unreadable",
        f"Not counted, since another run has the same settings and seed: {tmp_path}/",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(page.data["runs"]["rows"]) == 8
    assert all(
        value is None or isinstance(value, (int, float, str))
        for row in page.data["runs"]["rows"]
        for _, value, *_ in row
    )


WEIRD = {
    "status is a number": ("summary.json", '{"status": 1, "study_name": 5}'),
    "enormous integer": ("summary.json", '{"status": "completed", "test_acc": 1' + 400 * "0" + "}"),
    "integer beyond what Python reads": ("summary.json", '{"status": "completed", "test_acc": 1' + 5000 * "0" + "}"),
    "nested too deep": ("summary.json", 100_000 * "["),
    "half a letter in a key": ("summary.json", '{"status": "completed", "test_acc": 0.5, "k\\ud800": 1}'),
    "lone surrogate": ("summary.json", '{"status": "completed", "test_acc": 0.5, "note": "\\ud800"}'),
    "nothing but null": ("summary.json", '{"status": null, "test_acc": null, "weight_bits": null}'),
    "list for a figure": ("summary.json", '{"status": "completed", "test_acc": [1], "seconds": {"a": 1}}'),
    "list for a site": ("levels.jsonl", '{"epoch": 1, "site": ["a"]}\n'),
    "no kind": ("levels.jsonl", '{"epoch": 1, "site": "a", "bits": 2, "kind": null, "effectiveness": 50}\n'),
    "epoch beyond a float": ("metrics.jsonl", '{"epoch": 1' + 400 * "0" + "}\n"),
    "a date": (".hydra/config.yaml", "when: 2024-01-01\nseed: 1\n"),
    "a date that is none": (".hydra/config.yaml", "when: 2024-13-45\nseed: 1\n"),
    "no settings": (".hydra/config.yaml", "- a\n"),
    "an array for an archive": ("histograms.npz", np.arange(3)),
    "edges that are not": ("histograms.npz", {"a.weight@edges": np.array([np.inf, 1.0]), "a.weight@1": np.array([1])}),
    "no edges at all": ("histograms.npz", {"a.weight@edges": np.array([]), "a.weight@1": np.array([])}),
}


@pytest.mark.parametrize("alone", [False, True], ids=["among others", "alone"])
@pytest.mark.parametrize("what", WEIRD)
def test_no_file_of_a_run_costs_the_report(sweep, tmp_path, what, alone):
    name, content = WEIRD[what]
    write_run(tmp_path / "odd", lambda_br=3.0, summary={})
    if not alone:
        for strength in (0, 1.0):
            shutil.copytree(sweep / f"2/{strength}/frozen0", tmp_path / f"{strength}")
    if isinstance(content, str):
        (tmp_path / "odd" / name).write_text(content)
    elif isinstance(content, dict):
        np.savez(tmp_path / "odd" / name, **content)
    else:
        with (tmp_path / "odd" / name).open("wb") as file:
            np.save(file, content)
    drawn = alone and name in ("histograms.npz", "levels.jsonl", "metrics.jsonl")
    assert main([str(tmp_path), *([] if drawn else ["--no-figures"])]) == 0
    page = Page(tmp_path / "report/index.html")
    assert len(page.data["runs"]["rows"]) == (1 if alone else 3)
    if drawn and name == "histograms.npz":
        assert "no figure level_histograms_W2A2" in page.text and "histograms.npz" in page.text


def test_folder_that_is_not_to_be_looked_into_is_named(tmp_path, monkeypatch):
    write_run(tmp_path / "0", summary={})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "shut").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    assert main([str(tmp_path), "--no-figures"]) == 0
    assert f"{tmp_path}/shut: Permission denied" in Page(tmp_path / "report/index.html").text


def test_what_others_put_beside_the_figures_stays_and_figures_of_before_go(sweep, tmp_path):
    shutil.copytree(sweep / "2/0/frozen0", tmp_path / "run")
    assert main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "figures/level_histograms_W2A2.png").is_file()
    (tmp_path / "figures/mine.png").write_bytes(b"mine")
    (tmp_path / "run/histograms.npz").unlink()
    assert main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "figures/mine.png").is_file()
    assert not (tmp_path / "figures/level_histograms_W2A2.png").exists()


def test_markup_in_a_setting_stays_text(tmp_path):
    write_run(tmp_path / "0", summary={}, note="</script><script>alert(1)</script>")
    write_run(tmp_path / "1", summary={}, note="<b>bold</b>")
    assert main([str(tmp_path), "--no-figures"]) == 0
    text = (tmp_path / "report/index.html").read_text()
    assert "<script>alert" not in text and "<b>bold" not in text
    assert any(
        "alert(1)" in cell[0] for row in Page(tmp_path / "report/index.html").data["runs"]["rows"] for cell in row
    )


def test_out_that_cannot_be_written_is_refused_in_a_sentence(tmp_path, capsys):
    write_run(tmp_path / "0", summary={})
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path), "--out", str(tmp_path / "file/report")]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'brqat[dev]'")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no browser: apt-get install chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desk, light", "phone, dark"])
def shown(request, browser, report):
    """The page, every part of it looked at; what it said to the console."""
    width, scheme = request.param
    shown = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    shown.said = []
    shown.on("console", lambda message: message.type == "error" and shown.said.append(message.text))
    shown.on("pageerror", lambda error: shown.said.append(str(error)))
    shown.on("request", lambda request: shown.said.append(request.url) if request.url.startswith("http") else None)
    shown.goto((report / "index.html").as_uri())
    yield shown
    shown.close()


def column(shown, table, name):
    place = shown.locator(f"[data-table={table}] thead th").all_text_contents().index(name) + 1
    return shown.locator(f"[data-table={table}] tbody td:nth-child({place})").all_text_contents()


def test_table_is_sorted_by_a_click_and_by_the_keyboard(shown):
    button = shown.locator("[data-table=settings] th button", has_text="test_acc %").first
    button.click()
    means = [float(text.split()[0]) for text in column(shown, "settings", "test_acc %")]
    assert len(means) == 24 and means == sorted(means)
    assert shown.locator("[data-table=settings] th[aria-sort=ascending]").count() == 1
    button.focus()
    shown.keyboard.press("Enter")
    means = [float(text.split()[0]) for text in column(shown, "settings", "test_acc %")]
    assert means == sorted(means, reverse=True)
    assert shown.locator("[data-table=settings] th[aria-sort=descending]").count() == 1


def test_what_is_not_known_comes_last_whichever_way_is_sorted(shown):
    button = shown.locator("[data-table=runs] th button", has_text=re.compile("^test_acc$"))
    search = shown.locator("[data-table=runs] input")
    search.fill("away")  # a diverged run has no test accuracy
    assert column(shown, "runs", "test_acc") == [""]
    search.fill("")
    for _ in range(2):
        button.click()
        figures = column(shown, "runs", "test_acc")
        assert figures[-1] == "" and "" not in figures[:-1]


def test_filter_leaves_rows_that_have_all_words(shown):
    search = shown.locator("[data-table=runs] input")
    search.fill("frozen completed")
    assert shown.locator("[data-table=runs] tbody tr").count() == 36
    assert shown.locator("[data-table=runs] [role=status]").text_content() == "36 of 73"
    search.fill("lambda_br=1")  # and neither 0.1 nor 10
    assert shown.locator("[data-table=runs] tbody tr").count() == 18
    search.fill("quantizer.bits=2")  # as the answers name a setting
    assert shown.locator("[data-table=runs] tbody tr").count() == 25
    search.fill("nothing has this")
    assert shown.locator("[data-table=runs] tbody tr").count() == 0


def test_page_draws_all_figures_without_an_error_and_fits_its_window(shown):
    shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    panels = shown.locator(".panel")
    for place in range(panels.count()):
        panels.nth(place).scroll_into_view_if_needed()
    shown.wait_for_function("document.querySelectorAll('.panel:not([data-drawn])').length === 0")
    assert panels.count() == shown.locator(".panel svg.main-svg:first-of-type").count() > 20
    assert shown.said == []
    wide = shown.evaluate("document.documentElement.scrollWidth")
    assert wide <= shown.viewport_size["width"]


def test_colours_follow_the_scheme(shown):
    shown.locator(".panel").first.scroll_into_view_if_needed()
    shown.wait_for_function("document.querySelector('.panel').dataset.drawn")
    colours = []
    for scheme in ("dark", "light"):
        shown.emulate_media(color_scheme=scheme)
        shown.wait_for_timeout(200)
        colours.append(
            shown.evaluate(
                "[getComputedStyle(document.body).backgroundColor, document.querySelector('.panel').layout.font.color]"
            )
        )
    assert colours == [["rgb(14, 18, 23)", "#e6edf3"], ["rgb(255, 255, 255)", "#1b1f24"]]


# ---- the command


def test_command_line_shows_progress_and_ends_well(sweep, tmp_path):
    words = [sys.executable, "-m", "multirun_analysis", str(sweep / "4"), "--out", str(tmp_path), "--no-figures"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=os.environ)
    assert done.returncode == 0 and f"wrote {tmp_path}/index.html" in done.stderr
    assert done.stdout.startswith("| alpha_policy |")
