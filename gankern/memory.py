"""Memory of the CPU that a process frees and soon wants again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1  # bytes that stay; mallopt takes an int
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, up to 2 GiB, for its next tensors.

    glibc gives large blocks back to the system at once, and the pages of the next tensor, touched
    for the first time, take longer than most kernels. The command `gankern` calls this; `import
    gankern` does not. Settings of the environment (MALLOC_*, GLIBC_TUNABLES) go first.

    Returns:
        Whether the C library has taken it: False for others than glibc, and where the environment
        sets malloc.
    """
    if any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MOST)) and bool(mallopt(M_TRIM_THRESHOLD, MOST))
