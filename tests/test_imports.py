"""Imports go down one staircase, and analysis stands on none of it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Highest first; a module may import from its own step or from any below.
STAIRCASE = [
    {"__main__"},
    {"train"},
    {"study"},
    {"baseline", "settings"},
    {"fit"},
    {"step"},
    {"checkpoint", "levels", "progress", "interrupt", "provenance"},
    {"fusion"},
    {"layers", "alpha_policy", "metrics", "batchnorm"},
    {"regularizer"},
    {"quantizer"},
    {"bins", "model", "dataset", "schedule", "tracking"},
    {"kernels"},
    {"grid", "files", "devices", "memory"},
]
STEP = {room: height for height, rooms in enumerate(STAIRCASE) for room in rooms}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


MODULES = sorted(p for p in (ROOT / "brqat").rglob("*.py") if p != ROOT / "brqat" / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_the_staircase(path):
    room = path.relative_to(ROOT / "brqat").with_suffix("").parts[0]
    for module in imports(path):
        if module.startswith("brqat.") and module != "brqat.__version__":
            assert STEP[room] <= STEP[room_of(module)], f"{path} imports {module}"


def test_nothing_needs_triton_to_be_imported():
    """It has no wheel for macOS: only kernels/triton.py may fail to import there, so others import it when called."""
    for path in MODULES:
        if path != ROOT / "brqat" / "kernels" / "triton.py":
            first = {m for node in ast.parse(path.read_text()).body for m in _names(node)}
            assert not any(m.split(".")[0] == "triton" or m.startswith("brqat.kernels.triton") for m in first), path


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {f"{node.module}.{a.name}" for a in node.names} if isinstance(node, ast.ImportFrom) else set()


def test_training_names_no_method():
    """Hydra's _target_ brings quantizers, regularizers, data sets, models and optimizers."""
    for module in imports(ROOT / "brqat" / "train.py") | imports(ROOT / "brqat" / "fit.py"):
        rooms = ("quantizer", "regularizer", "model")
        assert not any(module.startswith(f"brqat.{r}.") for r in rooms) or ".base." in module, module


@pytest.mark.parametrize("path", sorted((ROOT / "multirun_analysis").rglob("*.py")), ids=lambda p: p.name)
def test_analysis_reads_files_only(path):
    assert not {m.split(".")[0] for m in imports(path)} & {"brqat", "torch", "torchvision", "hydra"}
