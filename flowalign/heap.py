"""Keep freed memory in the process, which would otherwise fetch it again, page by page, for every pass."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_… of glibc's malloc.h
KEPT = 2**31 - 1
"""Bytes that may stay free at the top of the heap: the maximum. By default, glibc keeps twice the mmap threshold."""
MAPPED = 32 * 2**20
"""Blocks above this size are mapped, and returned to the system at once; 32 MiB is also glibc's largest default."""


def keep_freed() -> bool:
    """Configure glibc's malloc for this process. Returns False for another C library, or if the environment has set
    these thresholds."""
    environment = " ".join([*os.environ, os.environ.get("GLIBC_TUNABLES", "")]).lower()
    if sys.platform != "linux" or "trim_threshold" in environment or "mmap_threshold" in environment:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*o) == 1 for o in ((TRIM_THRESHOLD, KEPT), (MMAP_THRESHOLD, MAPPED)))
