"""What brqat-study does, given what cli.py read from the command line. Each returns the exit code."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import optuna
from rich.console import Console

from brqat.study import results
from brqat.study.board import best_first, standing, table
from brqat.study.ledger import Ledger, is_control, run_of
from brqat.study.storage import open_storage


def status(given: argparse.Namespace) -> int:
    ledger = _ledger(given)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(ledger))
    return 0


def export(given: argparse.Namespace) -> int:
    ledger, folder = _ledger(given), _folder(given)
    with ledger.storage.exclusive():
        results.write(ledger, folder)
    print(results.verdict(ledger, folder))
    return 0


def confirm(given: argparse.Namespace) -> int:
    """A plain multirun over the best settings and their controls, written as experiments, and the seeds."""
    for key in ("best", "seeds"):
        if getattr(given, key) < 1:
            raise ValueError(f"--{key} {getattr(given, key)} would run nothing: write 1 or more.")
    ledger, folder = _ledger(given), _folder(given)
    best = _distinct(best_first(ledger))
    if not best:
        raise ValueError(f"study {ledger.name} has no completed trial to confirm: {standing(ledger).in_words()}.")
    chosen = best[: given.best]
    chosen += [trial for trial in _controls_of(ledger, chosen) if trial not in chosen]
    # By number and not by place: another trial may be the best by the next time.
    names = [f"{ledger.name}_trial{trial.number}" for trial in chosen]
    for trial, name in zip(chosen, names, strict=True):
        results.write_experiment(ledger, folder, trial, name)
    command = [
        *(sys.executable, "-m", "brqat.train", "-m"),
        f"+experiment={','.join(names)}",
        f"seed={','.join(map(str, range(given.seeds)))}",
        f"hydra.searchpath=[{json.dumps(f'file://{folder}')}]",
        f"hydra.sweep.dir={json.dumps(str(folder / 'confirm'))}",
        "hydra.sweep.subdir=${hydra:runtime.choices.experiment}-seed${seed}",
        "resume=true",
    ]
    if not any(override.startswith("tracking=") and override != "tracking=wandb" for override in given.overrides):
        command += [f"tracking.group={ledger.name}", "tracking.job_type=confirm"]
    command += given.overrides
    print(" ".join(command), flush=True)
    code = subprocess.run(command).returncode
    print(f"mean and spread over the seeds: python -m multirun_analysis {folder / 'confirm'}")
    return code


# ---- the parts


def _ledger(given: argparse.Namespace) -> Ledger:
    path = Path(given.where)
    if "://" in given.where:
        storage = open_storage(given.where, Path.cwd(), create=False)
    else:
        files = [path / "study.db", path / "study.journal"] if path.is_dir() else [path]
        found = [file for file in files if file.is_file()]
        if not found:
            raise ValueError(
                f"{path} holds no study: neither study.db nor study.journal. Give the sweep's folder, such as "
                "multirun/lambda_bits, or the address that hydra.sweeper.storage had."
            )
        kind = "journal" if found[0].suffix == ".journal" else "sqlite"
        storage = open_storage(f"{kind}:///{found[0].absolute()}", path, create=False)
    names = [study.study_name for study in storage.optuna.get_all_studies()]
    name = given.study or (names[0] if len(names) == 1 else None)
    if name not in names:
        raise ValueError(f"{storage.where} holds {', '.join(names) or 'no study'}: name one with --study.")
    return Ledger(storage, name)


def _folder(given: argparse.Namespace) -> Path:
    path = given.folder or Path(given.where)
    if not given.folder and "://" in given.where:
        raise ValueError("an address does not say where the runs lie: give the sweep's folder with --folder.")
    return (path if path.is_dir() or given.folder else path.parent).absolute()


def _controls_of(ledger: Ledger, chosen: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """The arm without regularization beside each chosen trial: what it gained cannot be told without."""
    settings = json.loads(ledger.attrs.get("description", {}).get("control", "[]"))
    if not settings:
        return []
    over = [key for key in settings[0] if len({str(setting.get(key)) for setting in settings}) > 1]
    done = [t for t in ledger.trials() if is_control(t) and run_of(t).get("status") == "completed"]
    found = []
    for trial in chosen:
        wanted = [trial.user_attrs["setting"].get(key) for key in over]
        mine = [one for one in done if [one.user_attrs["setting"].get(key) for key in over] == wanted]
        if not mine:
            print(f"trial {trial.number} has no completed control to stand beside it", file=sys.stderr)
        found += [one for one in mine if one not in found]
    return found


def _distinct(trials: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """One trial for each setting, in the same order."""
    found = {}
    for trial in trials:
        found.setdefault(run_of(trial).get("config_hash", trial.number), trial)
    return list(found.values())
