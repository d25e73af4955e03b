"""The C++ of native/*.cpp, built on first use."""

import functools
from pathlib import Path

SOURCES = sorted((Path(__file__).parent / "native").glob("*.cpp"))


@functools.cache
def library() -> bool:
    """Whether torch.ops.brqat.* are there."""
    from torch.utils.cpp_extension import load

    try:
        load(
            "brqat_native",
            [str(path) for path in SOURCES],
            is_python_module=False,
            extra_cflags=["-O3", "-fopenmp"],  # without it at::parallel_for is a plain loop, and says nothing
            extra_ldflags=["-fopenmp"],
        )
    except (OSError, RuntimeError):
        return False
    return True
