"""What a benchmark's figures hang on besides the code."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine(*packages: str) -> dict[str, str | int]:
    """cpu, cores (that this process may use), threads (of torch), python, torch, the packages named, date (UTC)."""
    return {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in packages},
        "date": datetime.now(UTC).date().isoformat(),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu() -> str:
    """The processor's name and what it can compute with, as far as the system tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def line(facts: dict[str, str | int]) -> str:
    known = ("cpu", "cores", "threads", "python", "torch", "date")
    others = "".join(f", {name} {value}" for name, value in facts.items() if name not in known)
    return (
        f"{facts['cpu']}; cores: {facts['cores']}, threads of torch: {facts['threads']}; "
        f"Python {facts['python']}, torch {facts['torch']}{others}; {facts['date']}"
    )
