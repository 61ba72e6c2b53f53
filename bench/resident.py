"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
from pathlib import Path

PROC = Path("/proc/self")


def now() -> int:
    """Resident bytes."""
    return _status("VmRSS")


def settle() -> None:
    """Collect garbage, and return freed memory from the C library to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def restart_peak() -> bool:
    """Reset the peak to what is resident now. Returns whether the system allows that."""
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak(restarted: bool) -> int:
    """Peak resident bytes, since `restart_peak` if that succeeded, otherwise of the whole process."""
    return _status("VmHWM") if restarted else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024
