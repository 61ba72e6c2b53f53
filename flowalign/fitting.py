"""batch.micro=auto: the largest micro-batch that fits, by trial on an accelerator, by estimate elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from flowalign.exhausted import is_out_of_memory, nothing_fits

SHARE = 0.5
"""Share of the available memory that an estimate may use, since it omits operators' workspaces and other programs."""
MARGIN = 0.05
"""Share of an accelerator's memory that a trial leaves free, since training fragments memory more than a trial does."""


def search(sizes: Sequence[int], fits: Callable[[int], bool], agree: Callable[[bool], bool]) -> int:
    """The largest of ascending sizes that fits on every rank, by consensus (`agree`). NoMemoryError if none does."""
    found = largest_fitting(sizes, lambda size: agree(fits(size)))
    if found is None:
        raise nothing_fits(sizes[0])
    return found


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, found by doubling and then bisection; None if none does."""
    good, bad = -1, len(sizes)
    while bad - good > 1:
        if bad == len(sizes):
            doubled = 2 * sizes[good] if good >= 0 else 0
            i = next((i for i, size in enumerate(sizes) if size >= doubled), bad - 1)
        else:
            i = (good + bad) // 2
        if fits(sizes[i]):
            good = i
        else:
            bad = i
    return sizes[good] if good >= 0 else None


def fits_by_estimate(needed: Callable[[int], int], other: int, available: float) -> Callable[[int], bool]:
    """A test whether the bytes that n rows need, plus `other` bytes, are within SHARE of those available."""
    return lambda rows: needed(rows) + other <= SHARE * available


def fits_by_trial(
    step: Callable[[int], None], trained: Sequence[nn.Parameter], other: int, device: torch.device
) -> Callable[[int], bool]:
    """A test whether `step` runs on n rows while all gradients and `other` bytes are allocated; it frees all of it."""

    def fits(rows: int) -> bool:
        success = runs(rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return success

    def runs(rows: int) -> bool:
        try:
            with _reserved(trained, other + _margin(device), device):
                step(rows)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    return fits


@contextmanager
def _reserved(trained: Sequence[nn.Parameter], size: int, device: torch.device) -> Iterator[None]:
    """Allocate gradients and a block of `size` bytes; free both on exit."""
    block = torch.empty(size, dtype=torch.uint8, device=device)
    try:
        for p in trained:
            p.grad = torch.zeros_like(p)
        yield
    finally:
        for p in trained:
            p.grad = None
        del block


def _margin(device: torch.device) -> int:
    return int(MARGIN * torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0


def available_bytes(device: torch.device, processes: int) -> float:
    """Bytes of the device's memory that this process can still allocate. `processes` of them share the CPU's memory."""
    if device.type != "cuda":
        return min(_machine_available(), _cgroup_available()) / processes
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _machine_available() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: the total memory, of which SHARE is used
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes left below the container's limit, infinite without one. Cached files count as free, as in MemAvailable."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf
