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


@pytest.mark.slow
def test_the_benchmark_of_the_report_prints_its_table(tmp_path):
    program = [sys.executable, str(REPO / "benchmarks/report.py"), "--runs", "12", "--json", str(tmp_path / "f.json")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["runs"] == 12 and all(row["peak_mb"] > 10 for row in figures["calls"].values())
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")][1:] == [
        "first", "second", "one in a hundred changed", "tables only",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--json"], []])
def test_the_benchmark_of_feeding_prints_its_figures(words):
    program = [sys.executable, str(REPO / "benchmarks/feed.py"), "--images", "300", "--repeats", "2", "--threads", "1"]
    done = subprocess.run(
        [*program, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPO)}
    )
    if "takes a C++ compiler" in done.stderr:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0, done.stderr
    names = ["DataLoader, 2 workers", "plain torch", "native"]
    if not words:
        assert [row.split("|")[1].strip() for row in done.stdout.splitlines() if row.startswith("| ")][1:] == names
        return
    figures = json.loads(done.stdout)
    assert list(figures["images_per_second"]) == names and list(figures["ratio"]) == names[1:]
    assert all(row["low"] <= row["median"] <= row["high"] for row in figures["ratio"].values())
    assert set(figures["machine"]) == {"cpu", "cores", "threads", "python", "torch", "date"}


@pytest.mark.slow
def test_the_benchmark_of_startup_prints_its_figures():
    program = [sys.executable, str(REPO / "benchmarks/startup.py"), "--repeats", "1"]
    done = subprocess.run([*program, "--part", "a", "b", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["torch"] and found["machine"]["cores"]
    (figures,) = found["checkouts"].values()
    assert {"brqat --help", "in all, files", "imports, wandb", "data, files", "dashboard, wandb"} <= set(figures)
    phases = sum(one["median"] for name, one in figures.items() if name.endswith(", files") and "in all" not in name)
    assert 0.5 < phases / figures["in all, files"]["median"] < 2  # the phases are the whole
    done = subprocess.run([*program, "--part", "a"], capture_output=True, text=True)
    assert done.returncode == 0 and "| brqat --cfg job " in done.stdout, done.stderr
