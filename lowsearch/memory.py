"""What a process does with memory that it freed."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

KEEPS_FREED_MEMORY = platform.libc_ver()[0] == "glibc"
"""Whether `keep_freed_memory` can do anything here."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # As malloc.h numbers them.


@cache
def keep_freed_memory() -> None:
    """Have the C library of this process keep what is freed for the next allocation.

    glibc otherwise returns large tensors to the system and fetches new pages for the next ones, or does not: that depends on what else the
    process had freed before and what lies at the end of its heap (mallopt(3)), and changes the time of the same pass of the same network
    by a quarter. From then on the process holds as much memory as it needed at once.
    """
    if KEEPS_FREED_MEMORY:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
