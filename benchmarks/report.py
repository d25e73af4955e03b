"""How long multirun_analysis takes over many runs, and how much memory: the first call, and those after it.

    python benchmarks/report.py                     # 10,000 runs
    python benchmarks/report.py --runs 1000 --json report.json

Folders are synthetic, with config, summary, 30 epochs of metrics and levels of 8 sites each, about as brqat leaves them
for the digits; three seeds make a setting. Each call is a process of its own; its peak memory is the operating system's
figure. Rows: the first call reads all; the second has the cache; the third finds one run in a hundred changed.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

REPO = Path(__file__).resolve().parent.parent
EPOCHS, SITES = 30, 8
STATUSES = ("failed", "pruned", "diverged")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="brqat-benchmark-") as place:
        sweep = Path(place) / "sweep"
        make(sweep, given.runs)
        size = sum(file.stat().st_size for file in sweep.rglob("*") if file.is_file())
        rows = {"first": call(sweep), "second": call(sweep)}
        for number in range(0, given.runs, 100):
            path = sweep / f"{number}/summary.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 11.0}))
        rows["one in a hundred changed"] = call(sweep)
        rows["tables only"] = call(sweep, "--no-figures")
    print(f"{given.runs} runs, {size / 1e6:.0f} MB; {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| call | seconds | CPU seconds | peak MB |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['seconds']:.1f} | {row['cpu_s']:.1f} | {row['peak_mb']:.0f} |")
    if given.json:
        given.json.write_text(json.dumps({"runs": given.runs, "bytes": size, "calls": rows}, indent=1))


def make(sweep: Path, runs: int) -> None:
    """The folders. All runs of a setting share what their lines say: only the reader's time is measured."""
    config = yaml.safe_load((REPO / "docs/runs/digits/w4a4/0/.hydra/config.yaml").read_text())
    summary = json.loads((REPO / "docs/runs/digits/w4a4/0/summary.json").read_text())
    metrics = "".join(
        json.dumps({"epoch": e, "train/ce": 1 / e, "train/br": 0.1, "val/acc": 0.9}) + "\n" for e in _epochs()
    )
    levels = "".join(
        json.dumps(
            {"epoch": epoch, "site": f"blocks.{site // 2}.conv.{'input' if site % 2 else 'weight'}", "bits": 4,
             "kind": "act" if site % 2 else "weight", "effectiveness": 50 + epoch,
             **{f"figure_{number}": 0.123456789 * number for number in range(20)}}
        ) + "\n"
        for epoch in _epochs()
        for site in range(SITES)
    )  # fmt: skip
    for number in range(runs):
        folder = sweep / f"{number}"
        (folder / ".hydra").mkdir(parents=True)
        config["seed"] = number % 3
        bits = config["quantizer"]["bits"] = 2 + number // 3 % 3
        config["regularizer"]["lambda_br"] = 0.001 * (number // 9)
        (folder / ".hydra/config.yaml").write_text(
            yaml.dump(config, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
        )
        status = STATUSES[number % 3] if number % 50 == 0 else "completed"
        here = {
            "status": status,
            "seed": number % 3,
            "config_hash": f"{number:x}",
            "weight_bits": bits,
            "act_bits": bits,
        }
        here |= {"test_acc": 0.9 + number % 97 / 1000, "val_acc": 0.9 + number % 89 / 1000, "weight_bytes": 9000 * bits}
        (folder / "summary.json").write_text(json.dumps(summary | here))
        (folder / "metrics.jsonl").write_text(metrics)
        (folder / "levels.jsonl").write_text(levels)


def _epochs() -> range:
    return range(1, EPOCHS + 1)


def call(sweep: Path, *options: str) -> dict[str, float]:
    """One call of the report, in a process of its own."""
    words = [sys.executable, "-m", "multirun_analysis", str(sweep), *options]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(words, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_s": cpu, "peak_mb": used.ru_maxrss / 1024}


if __name__ == "__main__":
    main()
