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
    if "kernels=native cannot be had" in done.stderr:
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


def benchmark(name, *words):
    program = [sys.executable, str(REPO / "benchmarks" / name), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    if "kernels=native cannot be had" in done.stderr:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_spread(figure):
    return set(figure) == {"median", "low", "high"} and 0 < figure["low"] <= figure["median"] <= figure["high"]


@pytest.mark.slow
def test_the_benchmark_of_a_step_prints_its_figures():
    words = ["--model", "resnet20", "--no-peers", "--rounds", 2, "--steps", 1, "--batch", 8, "--threads", 1]
    found = json.loads(benchmark("step.py", *words, "--json"))
    assert set(found["ratio"]) == {"float", "brqat W2A2", "brqat W2A2 BR weights+activations"}
    assert all(is_spread(of) for of in [*found["ratio"].values(), found["of_br"]])
    facts = {"cpu", "cores", "threads", "python", "torch", "brevitas", "torchao", "date"}
    assert set(found["machine"]) == facts and found["machine"]["threads"] == 1


@pytest.mark.slow
def test_the_benchmark_of_an_operator_prints_its_figures():
    words = ["--sizes", "1e3", "300", "--bits", 1, 2, "--threads", 1, "--rounds", 2, "--json"]
    found = json.loads(benchmark("op.py", *words))
    assert [(one["elements"], one["bits"]) for one in found["cases"]] == [(1000, 1), (1000, 2), (300, 1), (300, 2)]
    for one in found["cases"]:
        assert list(one["ratio"]) == ["LSQ", "LSQ+BR", "LSQ, plain PyTorch", "LSQ+BR, plain PyTorch"]
        assert list(one["milliseconds"]) == ["ReLU", *one["ratio"]]
        assert all(map(is_spread, one["ratio"].values()))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_benchmark_of_memory_prints_its_figures():
    words = ["--batch", 8, "--repeats", 1, "--threads", 1, "--json"]
    found = json.loads(benchmark("memory.py", *words, "--no-peers"))
    assert list(found["ratio"]) == ["float", "brqat W2A2", "brqat W2A2 BR weights+activations"]
    for row, of in found["ratio"].items():
        assert set(of) == {"tensors", "resident"} and all(map(is_spread, of.values()))
        assert of["tensors"]["median"] > 1 or row == "float"  # what is quantized is kept besides


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory.py reads /proc")
def test_the_tables_are_written_and_a_part_is_measured_anew(tmp_path):
    benchmark("table.py", "--quick", "--out", tmp_path)
    page, stored = (tmp_path / "performance.md").read_text(), json.loads((tmp_path / "performance.json").read_text())
    assert list(stored) == ["step", "op", "feed", "startup", "memory", "allocators"]
    for part in stored.values():
        assert all(f"    python benchmarks/{one['command']}\n" in page for one in part)
    for row in ("brqat W2A2 BR weights+activations", "LSQ+BR", "native", "brqat --help", "glibc"):
        assert f"| {row} " in page
    for of in stored["allocators"][0]["found"]["allocators"].values():
        assert list(of) == ["glibc", "mallopt: no trim"]
        assert all(one["milliseconds"] > 0 and one["megabytes"] > 0 for one in of.values())
    benchmark("table.py", "--quick", "--out", tmp_path, "--parts", "op")
    again = json.loads((tmp_path / "performance.json").read_text())
    assert [part for part in stored if again[part] != stored[part]] == ["op"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["performance.json", "performance.md"]
