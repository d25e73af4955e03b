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
    assert not modules & {"torch._dynamo", "sympy"}  # brqat/eager.py does not fit this release of torch


def test_a_value_that_cannot_work_ends_with_its_sentence(tmp_path):
    code, said, _ = ran("brqat", "quantizer.bits=77", "tracking=files", folder=tmp_path)
    assert code == 2 and "brqat: " in said and "Traceback" not in said, said


def test_optimizers_do_without_the_compiler_what_they_do_with_it():
    """In one process: before anyone has imported the compiler, and after, when torch's own code runs."""
    code = """
import sys
import torch
from brqat.eager import spare_the_compiler

def trained(kind, **keys):
    torch.manual_seed(0)
    layer, images = torch.nn.Linear(5, 3), torch.randn(8, 5)
    optimizer = kind([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.05}], lr=0.1, **keys)
    for step in range(6):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        layer(images).square().sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    return torch.cat([p.detach().flatten() for p in layer.parameters()])

KINDS = [
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.RMSprop, {}),
]
spare_the_compiler()
spare_the_compiler()  # a second call changes nothing
before = [trained(kind, **keys) for kind, keys in KINDS]
assert "torch._dynamo" not in sys.modules
import torch._dynamo
calls, graph_break = [], torch._dynamo.graph_break
torch._dynamo.graph_break = lambda *given: calls.append(1)
after = [trained(kind, **keys) for kind, keys in KINDS]
assert len(calls) == len(KINDS) * 6 * 2, calls  # torch's own step ran
assert all(map(torch.equal, before, after))
"""
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
