"""benchmarks/ at the smallest size: that it runs and prints its tables."""

import json
import os
import subprocess
import sys

import pytest
from runs import REPO


@pytest.mark.slow
def test_the_benchmark_of_a_study_prints_its_tables(tmp_path):
    program = [sys.executable, str(REPO / "benchmarks/sweep.py"), "--json", str(tmp_path / "figures.json")]
    sizes = ["--part", "a", "c", "--trials", "2", "3", "--storage", "sqlite", "--repeats", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([*program, *sizes], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| study | sqlite")]
    assert [row[2].strip() for row in rows] == ["2", "3"]
    phases = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.endswith(" |")]
    assert {"ask", "tell", "claim", "Hydra: compose", "sampler"} <= set(phases)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["side"] for row in figures["a"]} == {"study", "optuna"}
    assert all(len(row["seconds"]) == 2 for row in figures["a"])
