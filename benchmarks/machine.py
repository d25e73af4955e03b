"""What a benchmark's figures hang on besides the code."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """cpu, cores (that this process may use), threads (of torch), python, torch, date (UTC)."""
    return {
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def cpu() -> str:
    """The processor's name and what it can compute with, as far as the system tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def line(facts: dict[str, str | int]) -> str:
    return (
        f"{facts['cpu']}; cores: {facts['cores']}, threads of torch: {facts['threads']}; "
        f"Python {facts['python']}, torch {facts['torch']}; {facts['date']}"
    )
