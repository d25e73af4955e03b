"""The device of a run; on a host with several GPUs, the one that fewest runs of ours are on."""

import getpass
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout


@contextmanager
def claimed_device(name: str) -> Iterator[torch.device]:
    """Inside, the device is counted as taken. Raises ValueError for one that cannot be used.

    name: auto (a GPU if there is one, else the CPU) or what torch.device takes. Among several GPUs auto takes the one
    that the fewest runs on this host hold, whatever command started them.
    """
    gpus = torch.cuda.device_count() if name == "auto" and torch.cuda.is_available() else 0
    if gpus <= 1:
        yield _usable("cuda" if gpus else "cpu" if name == "auto" else name)
        return
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(gpus)]
    with least_taken(names, Path(tempfile.gettempdir()) / f"brqat-{getpass.getuser()}") as index:
        torch.cuda.set_device(index)
        yield _usable(f"cuda:{index}")


@contextmanager
def least_taken(names: Sequence[str], folder: Path) -> Iterator[int]:
    """Inside, the position of the name that the fewest processes hold; a killed one's hold falls with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "choosing.lock"):
        holds = [_holds(name, folder) for name in names]
        index = min(range(len(names)), key=holds.__getitem__)
        lock = next(filter(None, (_taken(folder / f"{names[index]}.{place}.lock") for place in count())))
    try:
        yield index
    finally:
        lock.release()


def _holds(name: str, folder: Path) -> int:
    held = 0
    for file in folder.glob(f"{name}.*.lock"):
        lock = _taken(file)
        if lock is None:
            held += 1
        else:
            lock.release()
    return held


def _taken(file: Path) -> FileLock | None:
    """The lock, taken; None if another process holds it."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here ({reason}). Write device=auto or cpu.") from error
    return device
