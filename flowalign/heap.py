"""Freed memory that stays with the process, which else fetches it anew for every pass, page by page."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_… of glibc's malloc.h
KEPT = 2**31 - 1
"""Bytes that may lie free at the end of the heap, the most one can say. Untold, the library keeps twice a block."""
MAPPED = 32 * 2**20
"""Larger blocks are the system's and go back at once, as they do anyway."""


def keep_freed() -> bool:
    """For the whole process. False where the C library is another one, or its environment has told it already."""
    told = " ".join([*os.environ, os.environ.get("GLIBC_TUNABLES", "")]).lower()
    if sys.platform != "linux" or "trim_threshold" in told or "mmap_threshold" in told:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*o) == 1 for o in ((TRIM_THRESHOLD, KEPT), (MMAP_THRESHOLD, MAPPED)))
