"""Builds the C++ kernels of this folder's `native/` once per machine, and loads them as torch.ops.brqat."""

import hashlib
import os
import platform
import shutil
from pathlib import Path

import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "native"

# By the instruction set that torch has chosen, not -march=native: a cache may be shared by machines that differ.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}
# Without errno and traps rint and sqrt are instructions; neither changes a result.
COMMON = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


def load(folder: Path) -> None:
    torch.ops.load_library(str(_built(folder)))


def _built(folder: Path) -> Path:
    """Path of the library in `folder`, built if it is not there yet."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*COMMON, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *FLAGS.get(capability, [])]
    sources = sorted(SOURCES.glob("*.cpp"))
    parts = [torch.__version__, platform.machine(), *flags, *(p.read_text() for p in sorted(SOURCES.iterdir()))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = folder / f"brqat-{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"brqat-{key}.lock"):
        if not library.exists():
            _build(sources, flags, library)
    return library


def _build(sources: list[Path], flags: list[str], library: Path) -> None:
    from torch.utils import cpp_extension  # here: it takes long to import

    work = library.with_suffix(f".{os.getpid()}")
    work.mkdir()
    try:
        cpp_extension.load(
            "brqat_kernels",
            [str(path) for path in sources],
            extra_cflags=flags,
            build_directory=str(work),
            is_python_module=False,
            with_cuda=False,
        )
        (work / "brqat_kernels.so").replace(library)
    finally:
        shutil.rmtree(work)
