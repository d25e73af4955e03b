"""Checkpoints that are whole or absent, random states, and float weights from elsewhere."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from brqat.files import write_whole


def save(path: Path, state: dict[str, Any]) -> None:
    """torch.save to a temporary name, then renamed: a kill leaves the old file or the new one.

    By way of memory: what a signal's handler raises while torch writes to a file comes out as torch's RuntimeError, or
    aborts the process.
    """
    archive = io.BytesIO()
    torch.save(state, archive)
    write_whole(path, lambda file: file.write(archive.getbuffer()))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's state; code in the file is never run (weights_only).

    Raises ValueError for a file that is not a checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a PyTorch checkpoint of plain tensors: {error}") from error


def seed_everything(seed: int) -> None:
    """Every global generator a model or data set may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """States of every global generator a model or data set may draw from, in types that weights_only admits."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(_tuples(states["python"]))


def load_float_weights(model: nn.Module, path: Path) -> None:
    """Fills a float model from a state_dict file, or from a run's best.pt or last.pt.

    Quantizer keys in the file are passed over. Raises ValueError naming the keys that are missing, that have another
    shape, or that the model does not know: nothing is loaded in part.
    """
    if not path.exists():
        raise ValueError(
            f"pretrained={path} does not exist. Write the path of a state_dict file, auto to train the float "
            "network once, or none to start from random weights."
        )
    state = load(path)
    if isinstance(state, dict):
        state = state.get("model", state)
    if not isinstance(state, dict) or not all(
        hasattr(v, "shape") or k.endswith("_extra_state") for k, v in state.items()
    ):
        raise ValueError(f"pretrained={path} holds no state_dict: write one with torch.save(model.state_dict(), path).")
    given = {key: value for key, value in state.items() if "_quantizer." not in key}
    wanted = model.state_dict()
    faults = {
        "missing": [key for key in wanted if key not in given],
        "unknown": [key for key in given if key not in wanted],
        "of another shape": [k for k in wanted if k in given and given[k].shape != wanted[k].shape],
    }
    if any(faults.values()):
        said = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''})"
            for what, keys in faults.items()
            if keys
        )
        raise ValueError(
            f"pretrained={path} does not fit model {type(model).__name__}: {said}. Give the file of the same "
            "network with the same number of classes and input channels."
        )
    model.load_state_dict(given)


def once(folder: Path, done: Callable[[], bool], make: Callable[[], None], waiting: Callable[[], None]) -> None:
    """Calls make unless done, one process at a time; waiting is called every second that another one makes.

    The lock is the operating system's, on a file in the folder: it falls with the process that holds it, so that a
    killed maker is followed by the next one waiting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    while not done():
        try:
            lock.acquire(timeout=1)
        except Timeout:
            waiting()
            continue
        try:
            if not done():
                make()
        finally:
            lock.release()


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
