"""Builds the C++ kernels in `native/` once per machine, and loads them as torch.ops.brqat."""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from filelock import FileLock

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FOLDER = Path(os.environ.get("BRQAT_KERNELS", "~/.cache/brqat/kernels")).expanduser()

# By the instruction set that torch has chosen, not -march=native: the folder may be shared by machines that differ.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
# Compiled with OpenMP and linked without: its functions come with torch, and a second runtime would bring a second pool
# of threads that wait for each other's cores.
COMMON = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno"]


_failure: Exception | None = None


def load() -> None:
    """Raises RuntimeError or OSError where the library can neither be found nor built; tries that once per process."""
    global _failure
    if _failure is not None:
        raise _failure
    try:
        _load(FOLDER)
    except (RuntimeError, OSError) as error:
        _failure = error
        raise


@functools.cache
def _load(folder: Path) -> None:
    torch.ops.load_library(str(built(folder)))


def built(folder: Path) -> Path:
    """Path of the library in `folder`; builds it if it is not there yet. Safe beside other processes."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*COMMON, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *FLAGS.get(capability, [])]
    sources = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    parts = [torch.__version__, platform.machine(), *flags, *sources]
    library = folder / f"brqat-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock")):
            if not library.exists():
                _build(flags, library)
    return library


def _build(flags: list[str], library: Path) -> None:
    messages = logging.getLogger("torch.utils.cpp_extension")
    level = messages.level
    messages.setLevel(logging.ERROR)  # it warns of CUDA, which nothing here needs, already when it is imported
    try:
        _compile(flags, library)
    finally:
        messages.setLevel(level)


def _compile(flags: list[str], library: Path) -> None:
    """Under another name, then renamed: a killed build leaves no half of a library, and no lock that stays."""
    import ninja  # here and the next: to build only
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(f"there is no C++ compiler here ({compiler}; install one, or name it in CXX)")
    log.info("building the C++ kernels, once for this machine: about half a minute")
    work = library.with_suffix(f".{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)  # of a process killed meanwhile: a container gives the same number again
    work.mkdir()
    try:
        with _found_on_path(ninja.BIN_DIR):
            cpp_extension.load(
                library.stem,
                [str(path) for path in sorted(SOURCES.glob("*.cpp"))],
                extra_cflags=flags,
                build_directory=str(work),
                is_python_module=False,
                with_cuda=False,
            )
        (work / library.name).replace(library)
    except (subprocess.SubprocessError, RuntimeError) as error:
        faults = [line for line in str(error).splitlines() if "error:" in line]
        raise RuntimeError((faults or [f"the C++ kernels could not be built: {error}"])[0]) from error
    finally:
        shutil.rmtree(work)


@contextlib.contextmanager
def _found_on_path(folder: str):
    """A virtual environment that is not activated is not on the path, and torch calls ninja by its name."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
