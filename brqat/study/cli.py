"""brqat-study: looks at a study, and runs its best settings with more seeds."""

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


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for something that cannot be."""
    parser = argparse.ArgumentParser(prog="brqat-study", description=__doc__)
    commands = parser.add_subparsers(required=True)
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("where", help="the sweep's folder, its study.db or study.journal, or a storage's address")
    where.add_argument("--study", help="the study's name, where the storage holds several")
    status = commands.add_parser("status", parents=[where], help="where the study stands")
    status.set_defaults(command=_status)
    export = commands.add_parser("export", parents=[where], help="trials.csv and the like, written again")
    export.add_argument("--folder", type=Path, help="the sweep's folder, if `where` is an address")
    export.set_defaults(command=_export)
    confirm = commands.add_parser("confirm", parents=[where], help="the best settings again, with more seeds")
    confirm.add_argument("--best", type=int, default=3, metavar="K", help="settings to confirm (3)")
    confirm.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds for each (3)")
    confirm.add_argument("--folder", type=Path, help="the sweep's folder, if `where` is an address")
    confirm.add_argument("overrides", nargs="*", help="for all runs, as for brqat -m: threads=1, hydra/launcher=joblib")
    confirm.set_defaults(command=_confirm)
    given, rest = parser.parse_known_args(arguments)
    if rest and (given.command is not _confirm or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.command is _confirm:  # overrides behind an option are what argparse does not know
        given.overrides += rest
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return given.command(given)
    except ValueError as error:
        print(f"brqat-study: {error}", file=sys.stderr)
        return 2


def _status(given: argparse.Namespace) -> int:
    ledger = _ledger(given)
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(ledger))
    return 0


def _export(given: argparse.Namespace) -> int:
    ledger, folder = _ledger(given), _folder(given)
    with ledger.storage.exclusive():
        results.write(ledger, folder)
    print(results.verdict(ledger, folder))
    return 0


def _confirm(given: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
