"""Optuna's side of a study, from the file or database that keeps it. Reads only."""

import math
import re
import sqlite3
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pandas as pd

from .load import is_number

MOST = 500  # trials that importances are told from
FEWEST = 5  # completed trials, below which an importance says nothing


def _dict(value: object) -> dict:
    """An attribute that brqat writes; another program's may be anything."""
    return value if isinstance(value, dict) else {}


class Study(NamedTuple):
    name: str
    where: Path | str
    objectives: list[tuple[str, str]]  # name, maximize or minimize
    parameters: list[str]
    trials: pd.DataFrame  # number, state, control, seconds, value_0 ..., and a column per parameter
    importances: dict[str, float]  # of value_0; empty where there are too few trials
    without: str  # why there are none, or of how many trials they are


def read_studies(files: Iterable[Path], address: str | None = None) -> tuple[list[Study], list[str]]:
    """All studies in the files, and at the address of a database; and what could not be read.

    address: as hydra.sweeper.storage names it, postgresql://USER@HOST/DATABASE.
    """
    found, problems = [], []
    for where in [*files, *([address] if address else [])]:
        try:
            found += _studies_in(where)
        except Exception as error:  # a database says anything at all; a report must not end with it
            said = (str(error).splitlines() or [""])[0]
            password = _password(str(where))
            for part in filter(None, re.split("[@:/?]", password)):  # a driver may have cut it there
                said = said.replace(part, "***")
            said = f"{where}: no study could be read ({type(error).__name__}: {said})"
            problems.append(_without_password(said))
    return found, problems


def _password(where: str) -> str:
    """What an address has for one, so that no message repeats a part of it."""
    found = re.search(r":/{1,3}[^/:@\s]*:(\S*)@", where)
    return found[1] if found else ""


def _without_password(text: str) -> str:
    """Whatever stands between a user's name and the last @ of a word, and what a query calls password."""
    text = re.sub(r"(:/{1,3}[^/:@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(password=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)


def _studies_in(where: Path | str) -> list[Study]:
    import optuna  # here: a second, and only where there is a study
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(where, str):
        storage = RDBStorage(where.replace("postgresql://", "postgresql+psycopg://", 1))
    elif where.suffix == ".journal":
        storage = JournalStorage(JournalFileBackend(str(where)))
    else:
        address = f"file:{quote(str(where.absolute()))}?mode=ro"
        connect = partial(sqlite3.connect, address, uri=True, check_same_thread=False)
        storage = RDBStorage("sqlite://", engine_kwargs={"creator": connect})
    shown = where if isinstance(where, Path) else _without_password(where)
    return [_read(optuna.Study(one.study_name, storage), shown) for one in storage.get_all_studies()]


def _read(study, where: Path | str) -> Study:
    trials = study.get_trials(deepcopy=False)
    said = _dict(study.user_attrs.get("description")).get("objective", "")
    names = [part.split(" (")[0] for part in said.split(", ")] if said else []
    directions = [direction.name.lower() for direction in study.directions]
    if len(names) != len(directions):
        names = ["objective"] if len(directions) == 1 else [f"objective {i}" for i in range(len(directions))]
    parameters = list(dict.fromkeys(key for t in trials for key in _dict(t.user_attrs.get("setting")) or t.params))
    rows = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "status": _dict(trial.user_attrs.get("run")).get("status"),
            "control": bool(trial.user_attrs.get("control")),
            "seconds": trial.duration.total_seconds() if trial.duration else math.nan,
            **{f"value_{i}": value for i, value in enumerate(trial.values or [math.nan] * len(directions))},
            **(_dict(trial.user_attrs.get("setting")) or trial.params),
        }
        for trial in trials
    ]
    columns = ["number", "state", "status", "control", "seconds", *(f"value_{i}" for i in range(len(directions)))]
    frame = pd.DataFrame(rows, columns=[*columns, *parameters], dtype=object)
    importances, without = _importances(study, trials)
    return Study(
        study.study_name, where, list(zip(names, directions, strict=True)), parameters, frame, importances, without
    )


def _importances(study, trials: list) -> tuple[dict[str, float], str]:
    """fANOVA's, over completed trials that measured something: controls lie outside of the space."""
    import optuna

    measured = [
        trial
        for trial in trials
        if trial.state == optuna.trial.TrialState.COMPLETE
        and not trial.user_attrs.get("control")
        and _dict(trial.user_attrs.get("run")).get("status", "completed") == "completed"
        and is_number(trial.values[0])
    ]
    if len(measured) < FEWEST:
        return {}, f"{len(measured)} measured trials are too few for importances: at least {FEWEST}."
    if len(measured) > MOST:  # forests take minutes over thousands; evenly over the whole course
        measured = [measured[place * len(measured) // MOST] for place in range(MOST)]
    if len({trial.values[0] for trial in measured}) == 1:
        return {}, "all measured trials have the same value: no parameter mattered."
    alone = optuna.create_study(directions=study.directions)
    alone.add_trials(measured)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    target = None if len(study.directions) == 1 else lambda trial: trial.values[0]
    try:
        found = optuna.importance.get_param_importances(alone, evaluator=evaluator, target=target)
        return found, f"{len(measured)} trials" if found else "its trials share no parameter."
    except (ValueError, RuntimeError, ImportError) as error:
        return {}, f"Optuna could not tell importances: {error}"
