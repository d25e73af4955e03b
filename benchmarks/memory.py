"""Memory of a training step of brqat beside the same step in float and in other libraries, and what allocators cost.

    python benchmarks/memory.py [--model resnet20] [--batch 128] [--threads 2] [--repeats 3] [--json]
    python benchmarks/memory.py --allocators [--repeats 3] [--json]

The rows are those of benchmarks/step.py, each in processes of its own, which take turns.

tensors   the most bytes that torch's CPU allocator has given out at any moment of a step, as its profiler counts them:
          parameters, their gradients, momentum and all that the step keeps and makes
resident  the most memory that the process had in RAM in five steps (VmHWM) above what it had before the network was
          made; a network fed with two pictures has been made, trained for a step and thrown away before, so that
          libraries are loaded. It depends on the allocator: freed memory may stay, pieces may lie badly

--allocators runs the float and the BR step, and an evaluation of the BR network with 512 pictures under no_grad, with
the C library's allocator as it is, tuned by environment variables, tuned by mallopt in the process, with torch's large
pages, and with jemalloc and tcmalloc where they are found: milliseconds, those of all its threads on a processor, page
faults and resident as above. Linux only.
"""

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import line, machine
from rounds import markdown, quotients, said, spread
from step import BATCHES, BR_ROW, FLOAT, PEERS, a_batch, brqat_network, makers

from brqat import kernels

EVAL, EVAL_BATCH = "evaluation", 512
WARM_UP, STEPS = 4, 5
MEGABYTE = 1 << 20

# mallopt's names in malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
NO_MMAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    batch = given.batch or BATCHES[given.model]
    if given.inside:
        print(json.dumps(inside(*given.inside, given.model, batch)))
        return
    found = {"model": given.model, "batch": batch, "machine": machine(*PEERS.values())}
    found |= allocators(given, batch) if given.allocators else memory(given, batch)
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        print(allocator_table(found) if given.allocators else table(found))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BATCHES, default="resnet20")
    parser.add_argument("--batch", type=int, help=f"pictures; if not given {BATCHES}")
    parser.add_argument("--threads", type=int, help="of torch; as many as it likes if not given")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each row")
    parser.add_argument("--no-peers", action="store_true", help="brqat and float alone")
    parser.add_argument("--allocators", action="store_true", help="what allocators cost, instead of the rows' memory")
    parser.add_argument("--only", nargs="+", metavar="ALLOCATOR", help="of --allocators, besides the default")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)  # what a process of a row is started with
    return parser.parse_args(arguments)


def child(given: argparse.Namespace, batch: int, what: str, row: str, tune: str = "", **environment: str) -> dict:
    """What inside() finds in a process of its own; RuntimeError with what it said where it fails."""
    words = [__file__, "--model", given.model, "--batch", str(batch), "--threads", str(torch.get_num_threads())]
    command = [sys.executable, *words, "--inside", what, row, tune]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


# ---- the rows


def memory(given: argparse.Namespace, batch: int) -> dict:
    names = list(makers(given.model, a_batch(2)[0], peers=not given.no_peers))
    megabytes = {name: {"tensors": [], "resident": []} for name in names}
    for _ in range(given.repeats):
        for name in [name for name in names if name in megabytes]:
            try:
                for what, values in megabytes[name].items():
                    if what == "resident" or not values:  # what is counted does not vary
                        values.append(child(given, batch, what, name)["megabytes"])
            except RuntimeError as error:
                if name not in PEERS:
                    raise
                del megabytes[name]
                print(f"{name} is left out: {error}", file=sys.stderr)
    return {
        "megabytes": {
            name: {what: statistics.median(values) for what, values in of.items()} for name, of in megabytes.items()
        },
        "ratio": {
            name: {what: spread(quotients(values, megabytes[FLOAT][what])) for what, values in of.items()}
            for name, of in megabytes.items()
        },
    }


def table(found: dict) -> str:
    cells = [["step", "tensors, MB", "of float", "resident, MB", "of float (10% to 90%)"]]
    for name, of in found["megabytes"].items():
        ratio = found["ratio"][name]
        tensors = [f"{of['tensors']:.1f}", f"{ratio['tensors']['median']:.3f}"]
        cells.append([name, *tensors, f"{of['resident']:.1f}", said(ratio["resident"])])
    head = f"{found['model']}, batch {found['batch']}"
    return "\n".join([head, "", markdown(cells), "", line(found["machine"])])


# ---- allocators


def variants() -> dict[str, tuple[str, dict[str, str]]]:
    """Name -> what the process tunes by mallopt, and its environment."""
    found = {
        "glibc": ("", {}),
        "glibc, no mmap, no trim": ("", NO_MMAP),
        "mallopt: no mmap, no trim": ("no mmap, no trim", {}),
        "mallopt: no trim": ("no trim", {}),
        "mallopt: no mmap, no trim, top pad 64 MB": ("no mmap, no trim, top pad", {}),
        "glibc, no mmap, no trim, one arena": ("", NO_MMAP | {"MALLOC_ARENA_MAX": "1"}),
        "glibc, hugetlb=1": ("", LARGE_PAGES),
        "glibc, no mmap, no trim, hugetlb=1": ("", NO_MMAP | LARGE_PAGES),
        "torch's THP_MEM_ALLOC_ENABLE=1": ("", {"THP_MEM_ALLOC_ENABLE": "1"}),
        "mallopt: no mmap, no trim; THP_MEM_ALLOC_ENABLE=1": ("no mmap, no trim", {"THP_MEM_ALLOC_ENABLE": "1"}),
    }
    if path := library("libjemalloc.so*"):
        kept = {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
        found["jemalloc"] = ("", {"LD_PRELOAD": path})
        found["jemalloc, keeps all"] = ("", {"LD_PRELOAD": path} | kept)
    if path := library("libtcmalloc_minimal.so*") or library("libtcmalloc.so*"):
        found["tcmalloc"] = ("", {"LD_PRELOAD": path})
    return found


def library(pattern: str) -> str | None:
    return next((str(path) for folder in LIBRARIES for path in sorted(Path(folder).glob(pattern))), None)


def allocators(given: argparse.Namespace, batch: int) -> dict:
    """Row -> allocator -> milliseconds, faults and megabytes, and the ratio of milliseconds to glibc's as it is."""
    tried = {name: how for name, how in variants().items() if not given.only or name in ("glibc", *given.only)}
    figures = {row: {name: [] for name in tried} for row in (FLOAT, BR_ROW, EVAL)}
    for repeat in range(given.repeats):
        for name in list(tried) if repeat % 2 == 0 else reversed(tried):
            tune, environment = tried[name]
            for row, of in figures.items():
                of[name].append(child(given, batch, "speed", row, tune, **environment))
    keys = ("milliseconds", "cpu_milliseconds", "faults", "megabytes")
    return {
        "allocators": {
            row: {name: {key: statistics.median(one[key] for one in of[name]) for key in keys} for name in of}
            for row, of in figures.items()
        },
        "ratio": {
            row: {name: spread(quotients(milliseconds(of[name]), milliseconds(of["glibc"]))) for name in of}
            for row, of in figures.items()
        },
    }


def milliseconds(runs: list[dict]) -> list[float]:
    return [one["milliseconds"] for one in runs]


def allocator_table(found: dict) -> str:
    lines = []
    for row, of in found["allocators"].items():
        batch = EVAL_BATCH if row == EVAL else found["batch"]
        cells = [["allocator", "ms", "of glibc (10% to 90%)", "CPU ms", "page faults", "resident, MB"]]
        for name, one in of.items():
            ratio = said(found["ratio"][row][name], 2)
            last = [f"{one['cpu_milliseconds']:.1f}", f"{one['faults']:.0f}", f"{one['megabytes']:.0f}"]
            cells.append([name, f"{one['milliseconds']:.1f}", ratio, *last])
        lines += [f"{found['model']}, batch {batch}: {row}", "", markdown(cells), ""]
    return "\n".join([*lines, line(found["machine"])])


# ---- in a process of its own


def inside(what: str, row: str, tune: str, model: str, batch: int) -> dict[str, float]:
    if what == "tensors":
        return {"megabytes": most_given_out(model, row, batch) / MEGABYTE}
    mallopt(tune)
    rehearsed = made(model, row, 2)
    rehearsed()
    del rehearsed
    gc.collect()
    before = status("VmRSS")
    run = made(model, row, batch)
    for _ in range(WARM_UP):
        run()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    faults, cpu, times = page_faults(), time.process_time(), []
    for _ in range(STEPS if what == "resident" else 4 * STEPS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    faults, cpu = page_faults() - faults, time.process_time() - cpu
    return {
        "megabytes": (status("VmHWM") - before) / MEGABYTE,
        "milliseconds": 1e3 * statistics.median(times),
        "cpu_milliseconds": 1e3 * cpu / len(times),
        "faults": faults / len(times),
    }


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def made(model: str, row: str, batch: int) -> Callable[[], object]:
    if row == EVAL:
        return evaluation(model, EVAL_BATCH if batch > 2 else batch)
    images, labels = a_batch(batch)
    return partial(makers(model, images)[row](), images, labels)


def evaluation(model: str, batch: int) -> Callable[[], object]:
    images = a_batch(batch)[0]
    network = brqat_network(model, images, True, "native").eval()

    def run() -> None:
        kernels.choose("native", images.device)
        with torch.no_grad():
            network(images)

    return run


def most_given_out(model: str, row: str, batch: int) -> int:
    """Bytes. The profiler knows of what was made while it ran, so it runs from the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run = made(model, row, batch)
        for _ in range(2):
            run()
        with torch.profiler.record_function("a step"):
            run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    (step,) = [one for one in events if one.get("name") == "a step" and one.get("cat") == "user_annotation"]
    given_out = [one for one in events if one.get("name") == "[memory]"]
    return max(one["args"]["Total Allocated"] for one in given_out if 0 <= one["ts"] - step["ts"] <= step["dur"])


def mallopt(tune: str) -> None:
    """The C library's options of the same names, from within; nothing for an empty text."""
    values = {"no mmap": (M_MMAP_MAX, 0), "no trim": (M_TRIM_THRESHOLD, -1), "top pad": (M_TOP_PAD, 64 * MEGABYTE)}
    for part in filter(None, tune.split(", ")):
        if not ctypes.CDLL(None).mallopt(*values[part]):
            raise RuntimeError(f"mallopt refused: {part}")


def status(key: str) -> int:
    """Bytes, of /proc/self/status."""
    found = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(f"{key}:")]
    return 1024 * int(found[0].split()[1])


if __name__ == "__main__":
    main()
