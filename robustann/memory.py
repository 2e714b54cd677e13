"""Freed memory is kept for the next step instead of being handed back to the system."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Bytes: the largest that mallopt takes, and blocks up to which memory is taken from the heap (older
# versions know no more than 32 MiB).
_KEPT, _BLOCKS = 2**31 - 1, (2**30, 2**25)
# Who sets one of these has chosen.
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")


@functools.cache
def keep_freed() -> bool:
    """Let glibc keep up to 2 GiB of freed memory; whether it does so.

    Each pass through a network frees what it has computed in between. By glibc's own rule the top
    of the heap then goes back to the system, and the next pass faults it in page by page, zeroed:
    up to a third of the time of a small network on the CPU, or nothing, as the heap happens to
    lie. A process is asked for this once; other systems and allocators, and whoever has set
    ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TOP_PAD_``, ``LD_PRELOAD`` or
    glibc's tunables of malloc, are left as they are.

    >>> keep_freed() == keep_freed()
    True
    """
    chosen = any(os.environ.get(name) for name in _CHOSEN)
    chosen = chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    kept = bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
    return kept and any(mallopt(_M_MMAP_THRESHOLD, size) for size in _BLOCKS)
