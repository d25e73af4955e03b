"""What the C library does with memory that is given back."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next use; False where there is no glibc to be told.

    By itself it hands large blocks back to the system, and every layer of the next step maps them in again, page by
    page: an evaluation with 512 pictures at once took twice as long (LOG.md). Both settings belong together: one alone
    switches off the threshold that glibc adapts by itself.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))
