"""Whole studies, from the command line to what they leave: what is refused, pruned, broken, diverged, and run again."""

import csv
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from optuna.trial import TrialState
from PIL import Image
from runs import REPO, SYNTHETIC, assert_same_run, overrides_of, records, rows, summary

import brqat.train
from brqat import checkpoint
from brqat.study import cli
from brqat.study.ledger import Ledger, run_of
from brqat.study.storage import open_storage

LAMBDA = "regularizer.lambda_br=tag(log,interval(0.1,10))"
BITS = "quantizer.bits=choice(2,4)"
CONTROL = "+hydra.sweeper.control.set={regularizer.lambda_br: 0}"
PATIENCE_S = 200


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def call(cache):
    """Calls the command line in this process; gives its exit code and what it printed."""

    def call(*words):
        with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as streams:
            patch.setattr(sys, "argv", ["brqat", *words, f"cache_dir={cache}"])
            printed = Printed()
            streams.setattr(sys, "stdout", printed)
            streams.setattr(sys, "stderr", printed)
            before = logging.root.handlers[:], logging.root.level
            try:
                code = brqat.train.main() or 0
            except SystemExit as end:
                code = end.code
            finally:
                logging.root.handlers[:], level = before
                logging.root.setLevel(level)
                HydraConfig.instance().cfg = None
        return code, "".join(printed.parts)

    return call


class Printed:
    """A stream that is no terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.parts = []

    def write(self, text):
        self.parts.append(text)

    def flush(self): ...

    def isatty(self):
        return False


def study(folder, *given):
    """The words of a small study in a folder."""
    words = overrides_of(*SYNTHETIC, *given)
    return ["-m", "hydra/sweeper=study", f"hydra.sweep.dir={folder}", "hydra.sweeper.study_name=s", *words]


def ledger_of(folder, name="s"):
    return Ledger(open_storage(None, folder, create=False), name)


def statuses(folder):
    return [run_of(row).get("status") for row in ledger_of(folder).trials()]


def best_first(folder):
    """At equal accuracy lower loss: small validation splits tie often."""
    return sorted(ledger_of(folder).trials(), key=lambda row: (-row.value, run_of(row)["val_loss"], row.number))


SEARCH = (LAMBDA, BITS, CONTROL, "+hydra.sweeper.control.over=[quantizer.bits]", "hydra.sweeper.n_trials=5")
SEARCH = (*SEARCH, "seed=1", "optimizer.lr=0.02", "alpha_policy=frozen")  # no defaults, which would hide their loss


@pytest.fixture(scope="module")
def done(tmp_path_factory, call):
    """A study that came to its end: two controls, three trials."""
    folder = tmp_path_factory.mktemp("done") / "s"
    code, said = call(*study(folder, *SEARCH))
    assert code == 0, said
    return folder


@pytest.fixture
def copied(tmp_path, done):
    """A copy of it to break. Its rows name the folders of the first."""
    shutil.copytree(done, tmp_path / "s")
    return tmp_path / "s"


# ---- a study that came to its end


def test_each_row_is_the_run_in_the_folder_of_its_number(done):
    rows_of = ledger_of(done).trials()
    assert [row.number for row in rows_of] == [0, 1, 2, 3, 4]
    assert sorted(path.name for path in done.iterdir() if path.name.isdigit()) == ["0", "1", "2", "3", "4"]
    for row in rows_of:
        found = summary(done / str(row.number))
        assert (found["study_name"], found["trial_number"]) == ("s", row.number)
        assert row.state == TrialState.COMPLETE and row.values == [found["objective"]] == [found["val_acc"]]
        assert run_of(row)["folder"] == str(done / str(row.number))
        assert all(found[key] == value for key, value in run_of(row).items() if key != "folder")
        config = OmegaConf.load(done / str(row.number) / ".hydra/config.yaml")
        assert config.trial.number == row.number
        for key, value in row.user_attrs["setting"].items():
            assert OmegaConf.select(config, key) == value


def test_controls_came_first_with_every_bit_width(done):
    settings = [row.user_attrs["setting"] for row in ledger_of(done).trials()]
    assert settings[:2] == [{"quantizer.bits": bits, "regularizer.lambda_br": 0} for bits in (2, 4)]
    assert all(0.1 <= setting["regularizer.lambda_br"] <= 10 for setting in settings[2:])
    assert [bool(row.user_attrs.get("control")) for row in ledger_of(done).trials()] == [True] * 2 + [False] * 3


def test_results_name_the_best_row(done):
    found = OmegaConf.load(done / "optimization_results.yaml")
    best = best_first(done)[0]
    assert (found.best_trial, found.best_value) == (best.number, best.value)
    assert dict(found.best_params) == best.user_attrs["setting"]
    assert dict(found.trials) == {"n_trials": 5, "completed": 5, "pruned": 0, "failed": 0, "unfinished": 0}


def test_table_of_trials_holds_settings_and_figures(done):
    with open(done / "trials.csv") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, ledger_of(done).trials(), strict=True):
        found = summary(done / str(row.number))
        assert int(line["number"]) == row.number and (line["state"], line["status"]) == ("COMPLETE", "completed")
        for key in ("val_acc", "test_acc", "float_test_acc", "weight_bytes", "seconds"):
            assert float(line[key]) == found[key]
        assert float(line["value"]) == row.value and line["control"] == str(row.number < 2)
        assert all(float(line[key]) == value for key, value in row.user_attrs["setting"].items())


def test_best_experiment_runs_again_to_the_same_figures(done, tmp_path, call):
    best = OmegaConf.load(done / "optimization_results.yaml").best_trial
    words = ["+experiment=s_best", f"hydra.searchpath=[file://{done}]", f"hydra.run.dir={tmp_path}"]
    code, said = call(*words, "tracking=files")
    assert code == 0, said
    again, first = summary(tmp_path), summary(done / str(best))
    for key in ("config_hash", "val_acc", "val_loss", "test_acc", "best_epoch"):
        assert again[key] == first[key]
    assert (again["study_name"], again["trial_number"]) == (None, None)


def test_same_command_again_runs_nothing_and_a_greater_total_goes_on(copied, call):
    before = {path: path.stat().st_mtime_ns for path in copied.glob("*/metrics.jsonl")}
    code, said = call(*study(copied, *SEARCH))
    assert code == 0 and "5 of 5 trials ended" in said
    code, said = call(*study(copied, *SEARCH, "hydra.sweeper.n_trials=6"))
    assert code == 0 and "6 of 6 trials ended" in said
    assert {path: path.stat().st_mtime_ns for path in copied.glob("[0-4]/metrics.jsonl")} == before
    settings = [row.user_attrs["setting"] for row in ledger_of(copied).trials()]
    assert len(settings) == len({str(setting) for setting in settings}) == 6


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "lines"),
    [
        (
            ["regularizer.lambda_br=tag(log,interval(0.1,100))"],
            ["- search regularizer.lambda_br: float", r'\+ search regularizer.lambda_br: float .*"high": 100.0'],
        ),
        (
            ["quantizer.bits=choice(2,3,4)"],
            [r"- search quantizer.bits: .*\[2, 4\]", r"\+ search quantizer.bits.*\[2, 3"],
        ),
        (["objective=val_loss"], [r"- objective: val_acc \(maximize\)", r"\+ objective: val_loss \(minimize\)"]),
        (["epochs=3"], ["- epochs: 2", r"\+ epochs: 3"]),
        (["+hydra.sweeper.control.set={regularizer.lambda_br: 0.5}"], ["- control: ", r"\+ control: "]),
        (["model=resnet8"], ["- model._target_", r"\+ model._target_"]),
    ],
    ids=["range", "choice", "objective", "epochs", "control", "model"],
)
def test_study_with_other_settings_is_refused_with_what_differs(copied, call, given, lines):
    before = ledger_of(copied).attrs
    code, said = call(*study(copied, *SEARCH, *given, "hydra.sweeper.n_trials=6"))
    assert code == 2 and "Traceback" not in said and "was begun with other settings" in said
    assert ledger_of(copied).attrs == before
    for line in lines:
        assert re.search(line, said)
    assert len(ledger_of(copied).trials()) == 5


def test_what_changes_no_figure_may_differ(copied, call):
    given = ("tracking=wandb", "tracking.mode=disabled", "hydra.sweeper.n_trials=6", "hydra.sweeper.max_retry=1")
    code, said = call(*study(copied, *SEARCH, *given))
    assert code == 0 and len(ledger_of(copied).trials()) == 6, said


def test_forced_study_goes_on_with_other_settings_and_keeps_note_of_it(copied, call):
    given = ("epochs=3", "regularizer.lambda_br=tag(log,interval(20,30))", "hydra.sweeper.n_trials=6")
    code, said = call(*study(copied, *SEARCH, *given, "hydra.sweeper.force=true"))
    assert code == 0 and "+ epochs: 3" in said
    assert summary(copied / "5")["epochs"] == 3
    assert 20 <= ledger_of(copied).row(5).user_attrs["setting"]["regularizer.lambda_br"] <= 30
    assert any("+ epochs: 3" in line for line in ledger_of(copied).attrs["forced"][0])
    code, said = call(*study(copied, *SEARCH, *given))  # from now on these are its settings
    assert code == 0


@pytest.fixture
def interrupted(copied, call, monkeypatch):
    """The study with a sixth trial that was stopped after its first epoch."""
    save = checkpoint.save

    def stop(path, state):
        save(path, state)
        if path == copied / "5/last.pt":
            raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        assert call(*study(copied, *SEARCH, "hydra.sweeper.n_trials=6"))[0] == 143
    assert ledger_of(copied).row(5).state == TrialState.WAITING and summary(copied / "5")["status"] == "interrupted"
    return copied


def test_interrupted_trial_goes_on_in_its_row_from_its_checkpoint(interrupted, call):
    (before,) = rows(interrupted / "5/metrics.jsonl")
    setting = ledger_of(interrupted).row(5).user_attrs["setting"]
    code, said = call(*study(interrupted, *SEARCH, "hydra.sweeper.n_trials=6"))
    assert code == 0 and "resumed after epoch 1" in said and "6 of 6 trials ended" in said
    row = ledger_of(interrupted).row(5)
    assert row.state == TrialState.COMPLETE and row.user_attrs["setting"] == setting
    assert row.user_attrs["lease"]["retries"] == 0  # it was stopped and did not die
    first, second = rows(interrupted / "5/metrics.jsonl")
    assert first == before and second["epoch"] == 2


def test_interrupted_trial_of_a_forced_study_starts_again_with_the_new_settings(interrupted, call):
    given = ("epochs=3", "hydra.sweeper.n_trials=6", "hydra.sweeper.force=true")
    code, said = call(*study(interrupted, *SEARCH, *given))
    assert code == 0 and "starts again" in said and "resumed" not in said
    assert [row["epoch"] for row in rows(interrupted / "5/metrics.jsonl")] == [1, 2, 3]
    assert ledger_of(interrupted).row(5).state == TrialState.COMPLETE and summary(interrupted / "5")["epochs"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [(["objective=val_loss"], "not for another objective"), (["quantizer.bits=choice(2,3)"], "cannot mix the old and")],
)
def test_force_cannot_mix_objectives_or_choices(copied, call, given, said):
    code, printed = call(*study(copied, *SEARCH, *given, "hydra.sweeper.n_trials=6", "hydra.sweeper.force=true"))
    assert code == 2 and said in printed and len(ledger_of(copied).trials()) == 5


def test_runs_whose_study_was_deleted_are_left_alone(copied, call):
    (copied / "study.db").unlink()
    before = {path: path.stat().st_mtime_ns for path in copied.glob("*/*.jsonl")}
    code, said = call(*study(copied, *SEARCH))
    assert code == 2 and "holds runs (0, 1, 2, 3, 4)" in said and "Traceback" not in said
    assert {path: path.stat().st_mtime_ns for path in copied.glob("*/*.jsonl")} == before


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "has nothing to search"),
        ([LAMBDA, "hydra.sweeper.direction=minimize"], "contradicts objective=.*'maximize'"),
        ([LAMBDA, "objective=test_acc"], "objective='test_acc' is not known"),
        (
            [LAMBDA, "objective=[val_acc,bops]", "hydra/sweeper/pruner=median"],
            "MedianPruner compares epochs by val_acc or val_loss.*write hydra/sweeper/pruner=none",
        ),
        ([LAMBDA, "objective=bops", "hydra/sweeper/pruner=patient"], "PatientPruner compares epochs by"),
        ([LAMBDA, "hydra.sweeper.pruner=medium"], "pruner=medium is not known"),
        ([LAMBDA, "+hydra.sweeper.constraints.size.max=1"], "size: no figure of a run"),
        ([LAMBDA, "hydra.sweeper.storage=redis"], "storage=redis is not known"),
        ([LAMBDA, "hydra.sweeper.sampler=nsgaii"], "write hydra/sweeper/sampler=nsgaii"),
        (["regularizer.lamda=choice(0,1)"], "regularizer.lamda=0: no trial could be composed"),
        (["alpha_policy=choice(frozen,thawed)"], "alpha_policy=thawed: no trial could be composed"),
        ([LAMBDA, "seed=choice(0,1,2)"], "seed is not something to search.*brqat-study confirm"),
        (
            ["quantizer.bits=choice(2,9)"],
            "quantizer.bits=9 is in the search space, but quantizer.weight: bits=9 is not a width",
        ),
        ([LAMBDA, "quantizer.bits=choice(9,10)"], "quantizer.weight: bits=9 is not a width"),
        (["regularizer.lambda_br=interval(-1,1)", BITS], "regularizer.lambda_br=-0.98 is in the search space, but "),
        ([LAMBDA, "+hydra.sweeper.control.set={regularizer.lambda_br: -2}"], "lambda_br=-2 is the control, but "),
        ([LAMBDA, "pretrained=nowhere.pt"], "pretrained=nowhere.pt is no file"),
        ([LAMBDA, "++tracking.nope=1"], "tracking: .*takes no arguments"),
        ([LAMBDA, "device=cuda:99"], "cuda:99"),
        ([LAMBDA, "hydra.sweeper.check=brqat.nope"], "check=brqat.nope cannot be called"),
        ([LAMBDA, "dataset.images=choice(160,-5)"], "dataset.images=-5 is in the search space, but "),
        ([LAMBDA, "batch_size=5000", "dataset.val_fraction=interval(0.1,0.3)"], "batch_size=5000 "),
        (["model=small_cnn", "model.width=choice(8,0)"], "model.width=0 is in the search space, but "),
        ([LAMBDA, "batch_size=100000"], "batch_size=100000 "),
        ([LAMBDA, "epochs=-1"], "epochs=-1 cannot be"),
        ([LAMBDA, "hydra.launcher._target_=hydra_plugins.absent.Launcher"], "its plugin is not installed"),
        ([LAMBDA, "hydra.sweeper.n_jobs=0"], "n_jobs=0 cannot be"),
        ([LAMBDA, "hydra.sweeper.n_trials=0"], "n_trials=0 cannot be"),
        ([LAMBDA, CONTROL, "+hydra.sweeper.control.over=[seed]"], "names seed, which the study does not search"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_study_is_refused_in_a_sentence_before_anything_is_trained(tmp_path, call, given, match):
    code, said = call(*study(tmp_path / "s", *given))
    assert code == 2 and "Traceback" not in said and re.search(f"brqat: .*{match}", said), said
    assert not list(tmp_path.glob("s/*/"))


@pytest.mark.parametrize(("root", "said"), [("null", "dataset.root=FOLDER"), ("nowhere", "nowhere")])
def test_data_that_are_not_there_are_missed_before_the_first_trial(tmp_path, call, root, said):
    words = ["-m", "hydra/sweeper=study", f"hydra.sweep.dir={tmp_path / 's'}", LAMBDA]
    code, printed = call(*words, "dataset=image_folder", f"dataset.root={root}", "device=cpu", "threads=1")
    assert code == 2 and said in printed and "search space" not in printed and not (tmp_path / "s/study.db").exists()


def test_direction_that_says_what_the_objective_means_is_taken(tmp_path, call):
    given = (LAMBDA, "objective=val_loss", "hydra.sweeper.direction=minimize", "hydra.sweeper.n_trials=2")
    code, said = call(*study(tmp_path, *given))
    assert code == 0, said
    losses = [summary(tmp_path / name)["val_loss"] for name in "01"]
    assert OmegaConf.load(tmp_path / "optimization_results.yaml").best_value == min(losses)


# ---- what a trial may come to

# BR moves the step sizes so far that no run may begin, which only the network and the data can tell.
RUNS_AWAY = ("regularizer.lambda_br=interval(1e5,2e5)", "alpha_policy=backprop", "pretrained=none")
# Gives up whatever is below 2, an accuracy that none has.
ALWAYS = ("hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner", "+hydra.sweeper.pruner.lower=2")


def test_pruned_trial_ends_at_the_first_epoch_after_warmup_with_whole_files(tmp_path, call, cache):
    given = (LAMBDA, CONTROL, *ALWAYS, "epochs=4", "warmup_epochs=2", "hydra.sweeper.n_trials=2")
    code, said = call(*study(tmp_path / "s", *given))
    assert code == 0, said
    control, pruned = ledger_of(tmp_path / "s").trials()
    assert statuses(tmp_path / "s") == ["completed", "pruned"]
    assert (control.state, pruned.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    folder = tmp_path / "s/1"
    accuracy = [row["val/acc"] for row in rows(folder / "metrics.jsonl")]
    assert len(accuracy) == 3 and pruned.intermediate_values == {1: accuracy[2]}
    assert control.intermediate_values.keys() == {1}  # its last epoch is nobody's to give up
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 3
    found = summary(folder)
    assert (found["status"], found["last_epoch"], found["test_acc"]) == ("pruned", 3, None)
    assert found["objective"] == found["val_acc"] == accuracy[2] and "epoch 3" in found["pruned"]
    results = OmegaConf.load(tmp_path / "s/optimization_results.yaml")
    assert results.best_trial == 0 and results.trials.pruned == 1

    # Its own command takes it to its end, as if nothing had been.
    config = OmegaConf.load(folder / ".hydra/config.yaml")
    config.pop("trial")
    assert brqat.train.run(config, folder)["status"] == "completed"
    shutil.copytree(folder / ".hydra", tmp_path / "whole/.hydra")
    brqat.train.run(config, tmp_path / "whole")
    assert_same_run(folder, tmp_path / "whole")


def test_broken_configuration_ends_the_study_after_three_trials_with_its_reason(tmp_path, call):
    code, said = call(*study(tmp_path, *RUNS_AWAY))
    assert code == 1
    assert "the study stops: every trial fails the same way, 3 of 3: ValueError: " in said
    trials = ledger_of(tmp_path).trials()
    assert [row.state for row in trials] == [TrialState.FAIL] * 3
    assert all("alpha_policy.force=true" in run_of(row)["error"] for row in trials)
    assert all(summary(tmp_path / str(number))["status"] == "failed" for number in range(3))
    assert OmegaConf.load(tmp_path / "optimization_results.yaml").best_trial is None


def test_study_ends_after_three_trials_where_nothing_but_the_control_works(tmp_path, call):
    code, said = call(*study(tmp_path, *RUNS_AWAY, CONTROL))
    assert code == 1 and "every trial but the controls fails the same way, 3 of 3: ValueError: " in said
    assert [row.state for row in ledger_of(tmp_path).trials()] == [TrialState.COMPLETE, *[TrialState.FAIL] * 3]


def test_study_in_which_all_that_was_searched_fails_says_so_in_its_exit_code(tmp_path, call):
    code, said = call(*study(tmp_path, *RUNS_AWAY, CONTROL, "hydra.sweeper.n_trials=2"))
    assert code == 1 and "nothing that was searched has worked" in said and "failed: trial 1, the last with" in said


def test_values_that_do_not_go_with_some_others_are_warned_of(tmp_path, call):
    """sign is for 1 bit and lsq for more."""
    words = ("quantizer=choice(lsq,sign)", "quantizer.weight.bits=choice(1,2)", "hydra/sweeper/sampler=grid")
    code, said = call(*study(tmp_path, *words, "pretrained=none"))
    assert code == 0 and "trials such as quantizer=lsq quantizer.weight.bits=1 will fail: " in said, said
    assert statuses(tmp_path) == ["failed", "completed", "completed", "failed"]


def test_doubtful_values_do_not_end_the_study_when_they_come_first(tmp_path, call):
    words = ("quantizer=choice(lsq,sign)", "quantizer.weight.bits=choice(1,2)", "seed=choice(0,1,2)")
    code, said = call(*study(tmp_path, *words, "hydra/sweeper/sampler=grid", "pretrained=none"))
    assert code == 0, said
    assert statuses(tmp_path)[:3] == ["failed"] * 3 and statuses(tmp_path).count("completed") == 6


def test_finished_study_says_its_verdict_again_without_its_data(tmp_path, call):
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / f"data/{part}/{name}").mkdir(parents=True)
            for number in range(20):
                shade = 5 * number + 90 * (name == "a")
                Image.new("RGB", (8, 8), (shade, 2 * shade % 256, 255 - shade)).save(
                    tmp_path / f"data/{part}/{name}/{number}.png"
                )
    words = ["-m", "hydra/sweeper=study", f"hydra.sweep.dir={tmp_path / 's'}", "hydra.sweeper.study_name=s", LAMBDA]
    words += ["dataset=image_folder", f"dataset.root={tmp_path / 'data'}", "device=cpu", "threads=1", "epochs=1"]
    words += ["warmup_epochs=0", "batch_size=8", "tracking=files", "pretrained=none", "hydra.sweeper.n_trials=1"]
    code, said = call(*words)
    assert code == 0, said
    shutil.rmtree(tmp_path / "data")
    code, said = call(*words)
    assert code == 0 and "1 of 1 trials ended" in said


@pytest.mark.parametrize(("objective", "worst"), [("val_acc", 0.0), ("val_loss", 1e9)])
def test_setting_that_diverges_has_the_worst_objective_and_is_never_best(tmp_path, call, objective, worst):
    given = (
        "optimizer.lr=choice(1e20,0.05)",
        "pretrained=none",
        "hydra/sweeper/sampler=grid",
        f"objective={objective}",
    )
    code, said = call(*study(tmp_path, *given))
    assert code == 0 and "2 of 2 trials ended" in said, said
    diverged, other = ledger_of(tmp_path).trials()
    assert statuses(tmp_path) == ["diverged", "completed"]
    assert diverged.state == TrialState.COMPLETE and diverged.values == [worst]
    assert OmegaConf.load(tmp_path / "optimization_results.yaml").best_trial == other.number
    assert OmegaConf.load(tmp_path / "experiment/s_best.yaml").optimizer.lr == 0.05


def test_study_in_which_all_diverges_has_no_best(tmp_path, call):
    given = (LAMBDA, "optimizer.lr=1e20", "pretrained=none", "hydra.sweeper.n_trials=2")
    code, said = call(*study(tmp_path, *given))
    assert code == 1 and "nothing that was searched has worked" in said
    assert OmegaConf.load(tmp_path / "optimization_results.yaml").best_trial is None
    assert not (tmp_path / "experiment").exists() and statuses(tmp_path) == ["diverged"] * 2


def test_best_setting_keeps_its_constraint(tmp_path, call):
    given = ("quantizer.bits=choice(8,2)", "hydra/sweeper/sampler=grid", "pretrained=none")
    call(*study(tmp_path / "free", *given))
    sizes = [summary(tmp_path / "free" / name)["weight_bytes"] for name in "01"]
    bound = f"+hydra.sweeper.constraints.weight_bytes.max={sizes[1]}"
    code, said = call(*study(tmp_path / "bound", *given, bound))
    assert code == 0 and sizes[0] > sizes[1], said
    assert OmegaConf.load(tmp_path / "bound/optimization_results.yaml").best_trial == 1
    assert [row.constraints for row in ledger_of(tmp_path / "bound").trials()] == [
        {"weight_bytes max": sizes[0] - sizes[1]},
        {"weight_bytes max": 0},
    ]


def test_grid_runs_each_point_once(tmp_path, call):
    given = ("quantizer.bits=choice(2,4)", "seed=range(0,3)", "hydra/sweeper/sampler=grid", "pretrained=none")
    code, said = call(*study(tmp_path, *given, "hydra.sweeper.n_jobs=2"))
    assert code == 0 and "6 of 6 trials ended" in said, said
    points = [tuple(row.user_attrs["setting"].values()) for row in ledger_of(tmp_path).trials()]
    assert sorted(points) == [(bits, seed) for bits in (2, 4) for seed in (0, 1, 2)]
    assert statuses(tmp_path) == ["completed"] * 6


# ---- sweeps that conf has, and other sweepers


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPO / "conf/sweep").glob("*.yaml")))
def test_sweep_of_conf_runs_its_controls_and_a_trial(tmp_path, call, name):
    controls = {"lambda_bits": 3, "lambda_only": 1, "alpha_policy": 3, "pareto": 6}[name]
    words = ["-m", f"sweep={name}", f"hydra.sweep.dir={tmp_path}", f"hydra.sweeper.n_trials={controls + 1}"]
    code, said = call(*words, *overrides_of(*SYNTHETIC))
    assert code == 0, said
    trials = ledger_of(tmp_path, name).trials()
    assert [bool(row.user_attrs.get("control")) for row in trials] == [True] * controls + [False]
    assert len({str(row.user_attrs["setting"]) for row in trials}) == controls + 1
    assert all(row.user_attrs["setting"]["regularizer.lambda_br"] == 0 for row in trials[:-1])
    assert {run_of(row)["status"] for row in trials} <= {"completed", "diverged"}
    found = OmegaConf.load(tmp_path / "optimization_results.yaml")
    if name == "pareto":
        assert found.solutions
        for one in found.solutions:
            row = summary(tmp_path / str(one.trial))
            assert list(one["values"]) == [row["val_acc"], row["weight_bytes"]]
    else:
        assert found.best_value == max(row.value for row in trials)


def test_hydras_own_optuna_sweeper_still_works(tmp_path, call):
    words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=2", LAMBDA]
    code, said = call(*words, f"hydra.sweep.dir={tmp_path}", *overrides_of(*SYNTHETIC))
    assert code == 0, said
    found = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert found.best_value == max(summary(tmp_path / name)["val_acc"] for name in "01")
    assert summary(tmp_path / "0")["study_name"] is None


def test_plain_multirun_still_works(tmp_path, call):
    words = ["-m", "regularizer.lambda_br=0.1,1", f"hydra.sweep.dir={tmp_path}", *overrides_of(*SYNTHETIC)]
    code, said = call(*words)
    assert code == 0, said
    assert [summary(tmp_path / name)["status"] for name in "01"] == ["completed"] * 2
    assert not (tmp_path / "study.db").exists()


# ---- brqat-study


@pytest.mark.parametrize("where", ["{}", "{}/study.db", "sqlite:///{}/study.db"])
def test_status_finds_a_study_by_folder_file_and_address(done, capsys, where):
    assert cli.main(["status", where.format(done)]) == 0
    printed = capsys.readouterr().out
    assert "study s: 5 of 5 trials ended" in printed and printed.count("completed") == 5


def test_export_writes_what_the_study_wrote(copied, capsys):
    names = ("trials.csv", "optimization_results.yaml", "experiment/s_best.yaml")
    before = [(copied / name).read_text() for name in names]
    for name in names:
        (copied / name).unlink()
    assert cli.main(["export", str(copied)]) == 0
    again = [(copied / name).read_text() for name in names]
    assert again[:2] == before[:2] and "best setting" in capsys.readouterr().out
    assert OmegaConf.create(again[2]) == OmegaConf.create(before[2])
    (copied / names[0]).unlink()
    assert cli.main(["export", f"sqlite:///{copied}/study.db", "--folder", str(copied)]) == 0
    assert (copied / names[0]).read_text() == before[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "nowhere"], "nowhere holds no study: neither study.db nor study.journal"),
        (["status", "sqlite:///nowhere.db"], "there is no study at"),
        (["status", "redis://x"], "is not known"),
        (["status", "DONE", "--study", "other"], "holds s: name one with --study"),
        (["export", "sqlite:///DONE/study.db"], "give the sweep's folder with --folder"),
        (["confirm", "DONE", "--best", "0"], "--best 0 would run nothing"),
        (["confirm", "DONE", "--seeds", "0"], "--seeds 0 would run nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_brqat_study_says_a_mistake_in_a_sentence_with_exit_2(done, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main([word.replace("DONE", str(done)) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_study_without_a_completed_trial_has_nothing_to_confirm(tmp_path, call, capsys):
    call(*study(tmp_path, LAMBDA, "optimizer.lr=1e20", "pretrained=none", "hydra.sweeper.n_trials=1"))
    assert cli.main(["confirm", str(tmp_path)]) == 2
    assert "no completed trial to confirm" in capsys.readouterr().err


@pytest.mark.slow
def test_confirm_runs_the_best_settings_and_their_controls_with_each_seed(copied, cache, monkeypatch):
    monkeypatch.setenv("BRQAT_CACHE", str(cache))
    words = ["confirm", str(copied), "--best", "2", "--seeds", "2", "tracking=wandb"]
    assert cli.main(words) == 0
    best = best_first(copied)[:2]
    widths = {row.user_attrs["setting"]["quantizer.bits"] for row in best}
    controls = [row for row in ledger_of(copied).trials()[:2] if row.user_attrs["setting"]["quantizer.bits"] in widths]
    best += [row for row in controls if row.number not in {one.number for one in best}]
    folders = sorted((copied / "confirm").glob("*-seed*"))
    wanted = {f"s_trial{row.number}-seed{seed}": row for row in best for seed in (0, 1)}
    assert [folder.name for folder in folders] == sorted(wanted)
    for folder in folders:
        found, row = summary(folder), wanted[folder.name]
        assert found["status"] == "completed" and found["trial_number"] is None
        (run,) = [record["run"] for record in records(folder, found["wandb_run_id"]) if record["type"] == "run"]
        assert (run["run_group"], run["job_type"]) == ("s", "confirm")
        if found["seed"] == 1:
            assert found["config_hash"] == run_of(row)["config_hash"] and found["val_acc"] == run_of(row)["val_acc"]
    assert cli.main(words) == 0 and sorted((copied / "confirm").glob("*-seed*")) == folders  # nothing is run again


# ---- trial, folder and dashboard agree


@pytest.mark.slow
def test_number_folder_row_and_wandb_run_agree_under_two_workers(tmp_path):
    words = study(tmp_path / "s", LAMBDA, "tracking=wandb", "hydra.sweeper.n_trials=6", "pretrain_epochs=1")
    command = [sys.executable, "-m", "brqat.train", *words, f"cache_dir={tmp_path / 'cache'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) for _ in "ab"]
    try:
        said = [worker.communicate(timeout=PATIENCE_S)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert all("results in" in text for text in said)  # each ran some, or nothing was tested
    assert sum(text.count("training the float baseline, once") for text in said) == 1
    ledger = ledger_of(tmp_path / "s")
    uid, ids = ledger.attrs["uid"], set()
    assert [row.number for row in ledger.trials()] == list(range(6))
    for row in ledger.trials():
        folder = tmp_path / "s" / str(row.number)
        found, run_id = summary(folder), f"{uid}-{row.number}"
        ids.add(run_id)
        assert (found["study_name"], found["trial_number"], found["wandb_run_id"]) == ("s", row.number, run_id)
        assert run_of(row)["wandb_run_id"] == run_id and run_of(row)["folder"] == str(folder)
        (offline,) = folder.glob("wandb/offline-run-*")
        assert offline.name.endswith(f"-{run_id}")
        run, config = wandb_run(folder, run_id)
        assert (run["run_id"], run["run_group"], run["job_type"]) == (run_id, "s", "trial")
        assert run["display_name"] == f"s-{row.number}" and config["trial"]["number"] == row.number
        assert config["regularizer"]["lambda_br"] == row.user_attrs["setting"]["regularizer.lambda_br"]
    (baseline,) = (tmp_path / "cache/float").iterdir()
    run_id = summary(baseline)["wandb_run_id"]
    run, _ = wandb_run(baseline, run_id)
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("s", "baseline", "float baseline")
    assert len(ids | {run_id}) == 7


def wandb_run(folder, run_id):
    """The run's record in its offline file, and its config."""
    (run,) = [record["run"] for record in records(folder, run_id) if record["type"] == "run"]
    return run, run["config"]["update"]


# ---- what Hydra loads in every program


def test_plugin_brings_nothing_heavy_into_other_programs():
    code = "import sys, brqat.study.sweeper; print(*{m.partition('.')[0] for m in sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO).stdout
    assert "brqat" in found.split() and not {"torch", "optuna", "wandb", "sqlalchemy", "pandas"} & set(found.split())


def test_sweep_without_multirun_is_refused(tmp_path, call):
    code, said = call(f"hydra.run.dir={tmp_path}", "sweep=lambda_bits")
    assert code == 2 and "brqat -m sweep=lambda_bits" in said


def test_refused_run_leaves_the_config_of_the_one_that_is_there(tmp_path, call):
    words = [f"hydra.run.dir={tmp_path}", *overrides_of(*SYNTHETIC, "pretrained=none", "epochs=1", "warmup_epochs=0")]
    assert call(*words)[0] != 2
    before = {path.name: path.read_bytes() for path in tmp_path.glob(".hydra/*.yaml")}
    code, said = call(*words, "epochs=2", "resume=true")
    assert code == 2 and "another configuration" in said
    assert {path.name: path.read_bytes() for path in tmp_path.glob(".hydra/*.yaml")} == before
    assert "epochs: 1" in before["config.yaml"].decode()
