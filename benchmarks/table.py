"""Runs the benchmarks and writes docs/performance.md, with their figures beside it in docs/performance.json.

    python benchmarks/table.py                        # all of it; half an hour on two idle cores
    python benchmarks/table.py --parts step op        # these anew, the others as docs/performance.json has them
    python benchmarks/table.py --quick --out FOLDER   # the smallest sizes: a trial of this program

A part's figures are kept as soon as it is measured, so one that fails costs the parts before it nothing.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = ("resnet20", "resnet18", "mobilenet_v2")

# part -> the commands of its figures, whole and quick; each prints one JSON object with --json
COMMANDS = {
    "step": [
        f"step.py --model {model} --threads {threads} --rounds 11 --steps 1" for model in MODELS for threads in (1, 2)
    ]
    + ["step.py --model resnet20 --threads 2 --no-peers --compile --rounds 11 --steps 1"],
    "op": ["op.py"],
    "feed": ["feed.py --threads 1", "feed.py --threads 2"],
    "startup": ["startup.py --repeats 4"],
    "memory": [f"memory.py --model {model} --repeats 2" for model in MODELS],
    "allocators": [
        "memory.py --allocators --threads 1 --repeats 2 --only 'mallopt: no mmap, no trim' jemalloc tcmalloc"
    ],
}
QUICK = {
    "step": ["step.py --model resnet20 --threads 1 --no-peers --rounds 2 --steps 1 --batch 8"],
    "op": ["op.py --sizes 1e4 --bits 2 --threads 1 --rounds 2"],
    "feed": ["feed.py --images 300 --repeats 1 --threads 1"],
    "startup": ["startup.py --repeats 1 --part a"],
    "memory": ["memory.py --batch 8 --repeats 1 --no-peers --threads 1"],
    "allocators": ["memory.py --allocators --batch 8 --repeats 1 --threads 1 --only 'mallopt: no trim'"],
}

INTRO = """\
# How fast it is

Written by `python benchmarks/table.py`, not by hand; the figures are in [performance.json](performance.json). Each
table stands below the command that prints it, and above the machine and the versions it was measured with. A figure is
a median, and in brackets is how far it varied. A ratio is the median of the rounds' ratios, each of figures taken one
right after the other, and not the ratio of the medians beside it: what slows a whole round falls out of it. What comes
and goes within a round does not, so the cores have to be idle, and the same row measured twice may differ by what the
brackets say. Milliseconds are of this machine only. Rows of Brevitas and torchao are there where these are installed.
Where an operation takes fresh memory from the system each time (10 million elements), the system's part varies more
than ours, and a ratio below 1 says no more than that.
"""

TEXT = {
    "step": """\
## A training step

Forward, loss, penalties, backward and optimizer for one batch, beside the same step in float. W2A2 is two bits for
weights and activations, the first and last layers have eight. BR is Bin Regularization of both.

torch's learnable fake-quantize is LSQ in one operator of torch's own. Brevitas's layers learn a scale for each weight
and input, as LSQ does. torchao's flow has ranges from moving averages, folds BatchNorm into the weights it quantizes
and quantizes the sums of residual blocks as well. None of the three regularizes anything.
""",
    "op": """\
## One fake-quantization

Forward and backward of one tensor beside a ReLU's. LSQ+BR also gives the mean squared distance to the level in each
bin, with its gradient. Plain PyTorch is the reference that the kernels are tested against.
""",
    "feed": """\
## Feeding pictures

Random crops, mirroring and normalisation of a set as large as CIFAR-10, with nothing training beside it.
""",
    "startup": """\
## Starting

Seconds of whole commands, from the start of a process to its first training step, and between two runs of a multirun.
""",
    "memory": """\
## Memory of a training step

Tensors: the most bytes that torch's allocator had given out at one moment of a step. Resident: the most memory the
process had in RAM above what it had before the network was made.
""",
    "allocators": """\
## The allocator's share

The time of a step is partly the allocator's: memory that goes back to the system after each use has to be mapped
again, page by page.
""",
}


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    commands = QUICK if given.quick else COMMANDS
    given.out.mkdir(parents=True, exist_ok=True)
    stored = given.out / "performance.json"
    found = json.loads(stored.read_text()) if stored.exists() else {}
    for part in given.parts:
        found[part] = [measured(command) for command in commands[part]]
        write(stored, json.dumps(found, indent=1) + "\n")
    write(given.out / "performance.md", page(found))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="to measure (all)")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, whose figures mean nothing")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", metavar="FOLDER", help="(docs)")
    given = parser.parse_args(arguments)
    if given.quick and given.out.resolve() == HERE.parent / "docs":
        parser.error("--quick takes --out: its figures are not for docs/")
    return given


def measured(command: str) -> dict:
    """The command, when it began and of which commit, what it printed, and what it left out."""
    print(f"{datetime.now(UTC):%H:%M} python benchmarks/{command}", file=sys.stderr, flush=True)
    began = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    program, *words = shlex.split(command)
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(HERE / program), *words, "--json"], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"python benchmarks/{command} failed:\n{done.stderr[-4000:]}")
    left_out = [text for text in done.stderr.splitlines() if " is left out: " in text]
    found = json.loads(done.stdout)
    return {"command": command, "began": began, "commit": commit(), "found": found, "left_out": left_out}


def commit() -> str:
    """Of the code that was measured; docs/ may have changed, by this program."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE.parent), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "brqat", "benchmarks")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def page(found: dict[str, list[dict]]) -> str:
    parts = [INTRO]
    for part, text in TEXT.items():
        if part not in found:
            continue
        parts.append(text)
        for one in found[part]:
            table = printed(part)(one["found"]).strip()
            parts.append(f"    python benchmarks/{one['command']}\n\n{table}\n")
            parts += [f"{text}\n" for text in one["left_out"]]
            parts.append(f"Begun {one['began']}, at commit {one['commit']}.\n")
    return "\n".join(parts)


def printed(part: str) -> Callable[[dict], str]:
    """The benchmark's own table of its figures."""
    if part == "allocators":
        return import_module("memory").allocator_table
    if part == "startup":
        return startup
    return import_module(part).table


def startup(found: dict) -> str:
    module = import_module("startup")
    lines = []
    for title, rows in module.tables(found["checkouts"]).items():
        rows[0] = ["seconds", "median [lowest, highest]"]
        lines += [f"{title.partition('. ')[2]}:", "", module.markdown(rows), ""]
    return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in found["machine"].items())])


def write(file: Path, text: str) -> None:
    """The whole file or none of it."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)


if __name__ == "__main__":
    main()
