"""What a study leaves in its folder, rewritten whole by whichever worker ends.

optimization_results.yaml   the best setting, or the Pareto front, as hydra-optuna-sweeper writes it and a little more
trials.csv                  a row per trial
experiment/NAME.yaml        the best setting as an experiment, to run again
"""

import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from brqat.files import write_whole
from brqat.study.board import best_first, standing
from brqat.study.ledger import Ledger, is_control, run_of
from brqat.study.trial import FIGURES

log = logging.getLogger(__name__)

GROUPS = ("quantizer", "regularizer", "alpha_policy", "dataset", "model", "optimizer", "tracking")


def write(ledger: Ledger, folder: Path) -> None:
    """All three. The caller holds the study's lock."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.tmp"):  # of a worker that was killed here
        left.unlink(missing_ok=True)
    _text(folder / "optimization_results.yaml", OmegaConf.to_yaml(OmegaConf.create(summary(ledger))))
    _text(folder / "trials.csv", trials_csv(ledger))
    for trial in best_first(ledger)[:1]:
        try:
            write_experiment(ledger, folder, trial, f"{ledger.name}_best")
        except ValueError as error:
            log.warning("%s", error)


def summary(ledger: Ledger) -> dict[str, Any]:
    """The best setting and what it reached; null where no trial has completed."""
    where, ranked = standing(ledger), best_first(ledger)
    found: dict[str, Any] = {
        "name": "optuna",
        "study_name": ledger.name,
        "trials": {
            "n_trials": where.n_trials,
            "completed": where.completed,
            "pruned": where.pruned,
            "failed": where.failed,
            "unfinished": where.n_trials - where.ended,
        },
    }
    if len(ledger.study.directions) > 1:
        return found | {
            "solutions": [{"params": t.user_attrs["setting"], "values": t.values, "trial": t.number} for t in ranked]
        }
    best = ranked[0] if ranked else None
    return found | {
        "best_params": best and best.user_attrs["setting"],
        "best_value": best and best.value,
        "best_trial": best and best.number,
    }


def trials_csv(ledger: Ledger) -> str:
    """A row per trial: its setting, what became of it, and where."""
    trials = ledger.trials()
    searched = list(dict.fromkeys(key for trial in trials for key in trial.user_attrs.get("setting") or {}))
    objectives = [f"value_{index}" for index in range(len(ledger.study.directions))]
    objectives = ["value"] if len(objectives) == 1 else objectives
    figures = [key for key in FIGURES if key != "status"]
    head = ["number", "state", "status", *objectives, *searched, "control", "retries", "host", "folder"]
    out = io.StringIO()
    rows = csv.DictWriter(out, [*head, "started", "ended", *figures], restval="", lineterminator="\n")
    rows.writeheader()
    for trial in trials:
        run, lease = run_of(trial), trial.user_attrs.get("lease") or {}
        rows.writerow(
            {
                "number": trial.number,
                "state": trial.state.name,
                "status": run.get("status", ""),
                **dict(zip(objectives, trial.values or [], strict=False)),
                **(trial.user_attrs.get("setting") or {}),
                "control": is_control(trial),
                "retries": lease.get("retries", 0),
                "host": lease.get("host", "").split("/")[0],
                "folder": run.get("folder", ""),
                "started": trial.datetime_start or "",
                "ended": trial.datetime_complete or "",
                **{key: run.get(key, "") for key in figures},
            }
        )
    return out.getvalue()


def write_experiment(ledger: Ledger, folder: Path, trial: FrozenTrial, name: str) -> None:
    """The configuration of a trial as FOLDER/experiment/NAME.yaml. Raises ValueError."""
    there = folder / str(trial.number) / ".hydra"
    if not there.is_dir():
        there = Path(run_of(trial)["folder"]) / ".hydra"
    if not (there / "config.yaml").is_file():
        raise ValueError(
            f"the configuration of trial {trial.number} is not on this machine: {there} (it ran on "
            f"{trial.user_attrs['lease']['host'].split('/')[0]}). Copy its folder, or call brqat-study there."
        )
    config = OmegaConf.load(there / "config.yaml")
    choices = OmegaConf.load(there / "hydra.yaml").hydra.runtime.choices
    for key in ("trial", "resume", "tracking", "cache_dir"):
        config.pop(key, None)
    file = folder / "experiment" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    run = run_of(trial)
    setting = " ".join(f"{key}={value}" for key, value in trial.user_attrs["setting"].items())
    head = [
        "# @package _global_",
        f"# Trial {trial.number} of study {ledger.name}: {setting}",
        f"#   {command(folder, name)}",
        f"# {_figures(run)}: {run['folder']}",
        "defaults:",
        *(f"  - override /{group}: {choices[group]}" for group in GROUPS if group in config),
    ]
    _text(file, "\n".join(head) + "\n" + OmegaConf.to_yaml(config))


def command(folder: Path, name: str) -> str:
    """What runs an experiment of the study again."""
    return f"brqat +experiment={name} 'hydra.searchpath=[file://{folder}]'"


def came_to_nothing(ledger: Ledger) -> bool:
    """Whether all that was searched has failed or diverged; where nothing was yet, all controls."""
    trials = ledger.trials()
    searched = [trial for trial in trials if not is_control(trial)] or trials
    return bool(searched) and all(run_of(trial).get("status") in ("failed", "diverged") for trial in searched)


def verdict(ledger: Ledger, folder: Path) -> str:
    """The study's end in words."""
    lines = [f"study {ledger.name}: {standing(ledger).in_words()}"]
    failed = [trial for trial in ledger.trials() if trial.state == TrialState.FAIL]
    if failed:
        error = (run_of(failed[-1]).get("error") or "no reason given").splitlines()[0]
        lines.append(f"failed: trial {', '.join(str(trial.number) for trial in failed)}, the last with {error}")
    if came_to_nothing(ledger):
        lines.append("nothing that was searched has worked")
    ranked = best_first(ledger)
    if ranked:
        best = ranked[0]
        several = len(ledger.study.directions) > 1
        setting = " ".join(f"{key}={value}" for key, value in best.user_attrs["setting"].items())
        words = "first setting of the Pareto front" if several else "best setting"
        ties = [] if several else [trial for trial in ranked if trial.value == best.value]
        if len(ties) > 1:
            words = f"best setting, of {len(ties)} that tie the one with the lowest validation loss"
        if any(is_control(trial) for trial in ties) and not is_control(best):
            words = f"the control (lambda 0) is as good as the {words}"
        lines += [
            f"{words} (trial {best.number}): {setting}",
            f"  again: {command(folder, f'{ledger.name}_best')}",
            f"  more seeds: brqat-study confirm {folder}",
        ]
    return "\n".join([*lines, f"trials.csv and optimization_results.yaml are in {folder}"])


def _figures(run: Mapping) -> str:
    accuracies = {"test": run.get("test_acc"), "validation": run.get("val_acc"), "float": run.get("float_test_acc")}
    said = [f"{name} {100 * value:.2f} %" for name, value in accuracies.items() if value is not None]
    return f"Accuracy {', '.join(said)} (n=1), {run.get('seconds', 0):.0f} s"


def _text(file: Path, text: str) -> None:
    write_whole(file, lambda out: out.write(text.encode()))
