"""What a command imports before it is of use: start-up is imports, and they creep in."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
from runs import REPO

SCRIPTS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
ANALYSIS = {"pandas", "scipy", "matplotlib", "plotly", "sklearn"}
HEAVY = ANALYSIS | {"torch", "torchvision", "wandb", "optuna", "sqlalchemy"}


def ran(script, *words, folder):
    """A console command in a process of its own: the code it ends with, what it prints, the modules it has imported."""
    module, _, function = SCRIPTS[script].partition(":")
    code = (
        f"import atexit, json, sys; sys.argv = {[script, *words]!r}; "
        "atexit.register(lambda: json.dump(list(sys.modules), open('modules.json', 'w'))); "
        f"from {module} import {function}; sys.exit({function}())"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, set(json.loads((folder / "modules.json").read_text()))


@pytest.mark.parametrize(
    ("script", "words", "ends", "says"),
    [
        ("brqat", ["--help"], 0, "quantizer: lsq, sign"),
        ("brqat", ["--cfg", "job"], 0, "warmup_epochs: 5"),
        ("brqat", ["--info", "plugins"], 0, "StudySweeper"),
        ("brqat", ["epoch=3"], 1, "Key 'epoch' is not in struct"),
        ("brqat-study", ["--help"], 0, "where the study stands"),
        ("brqat-report", ["--help"], 0, "--no-figures"),
        ("brqat-report", ["no/such/folder"], 2, "is not a folder"),
    ],
)
def test_a_command_that_trains_nothing_imports_nothing_heavy(script, words, ends, says, tmp_path):
    code, said, modules = ran(script, *words, folder=tmp_path)
    assert code == ends and says in said, said
    assert not modules & HEAVY


def test_a_run_imports_only_what_it_uses(tmp_path):
    words = ["epochs=1", "warmup_epochs=0", "pretrained=none", "threads=1", "tracking=files", "hydra.run.dir=run"]
    code, said, modules = ran("brqat", *words, folder=tmp_path)
    assert code == 0, said
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "completed"
    assert (tmp_path / "run/train.log").stat().st_size > 0
    assert "torch" in modules
    assert not modules & (HEAVY - {"torch"})


def test_a_value_that_cannot_work_ends_with_its_sentence(tmp_path):
    code, said, _ = ran("brqat", "quantizer.bits=77", "tracking=files", folder=tmp_path)
    assert code == 2 and "brqat: " in said and "Traceback" not in said, said
