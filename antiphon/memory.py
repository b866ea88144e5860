"""The allocator: memory that was freed stays with the process.

glibc gives large blocks back to the kernel and asks for them again in the next step, and the kernel clears every page.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # names of settings in malloc.h
MORE = 64 << 20  # bytes that are asked for beyond what is needed


def hold_memory() -> bool:
    """Have the process keep the memory it frees; returns whether its allocator can be told so (that of Linux can)."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, MORE))
    return all(mallopt(setting, value) == 1 for setting, value in settings)
