"""An array kept on disk, for what takes long to compute."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from brqat.files import write_whole

log = logging.getLogger(__name__)


def cached(path: Path | None, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array stored at `path`, else compute() and store it. Without a path, just compute().

    The file is an .npz because that has a checksum: damage inside the pixels shows too. A damaged file is
    replaced, and one that cannot be written is done without, each with a warning.
    """
    if path is None:
        return compute()
    if path.exists():
        try:
            with np.load(path) as stored:
                return stored["array"]
        except Exception as error:  # zip, npy header, checksum, disk: whatever it is, the original is at hand
            log.warning("the cache file %s is damaged (%s): computing it anew", path, error)
    array = compute()
    try:
        write(path, array)
    except OSError as error:
        log.warning("cannot keep %s in the cache: %s", path, error)
    return array


def write(path: Path, array: np.ndarray) -> None:
    """Writes under a temporary name, then renames: no reader sees half a file and no crash leaves one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.savez(file, array=array))
