"""batch.micro=auto: the largest micro-batch that fits, by trying it on an accelerator, and by counting elsewhere."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from flowalign.exhausted import is_exhaustion, nothing_fits

SHARE = 0.5
"""Of the free memory, that what is counted may take: the insides of operations and other programs are not counted."""
MARGIN = 0.05
"""Of an accelerator's memory, that a trial leaves free: training cuts it into pieces which a trial does not know."""


def search(sizes: Sequence[int], fits: Callable[[int], bool], agree: Callable[[bool], bool]) -> int:
    """The largest of ascending sizes that fits on every rank, which `agree` says; NoMemoryError if none does."""
    found = largest_fitting(sizes, lambda size: agree(fits(size)))
    if found is None:
        raise nothing_fits(sizes[0])
    return found


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, None if none does: sizes are doubled until one does not, then halved
    in between."""
    good, bad = -1, len(sizes)
    while bad - good > 1:
        if bad == len(sizes):
            doubled = 2 * sizes[good] if good >= 0 else 0
            at = next((i for i, size in enumerate(sizes) if size >= doubled), bad - 1)
        else:
            at = (good + bad) // 2
        if fits(sizes[at]):
            good = at
        else:
            bad = at
    return sizes[good] if good >= 0 else None


def fits_by_estimate(taken: Callable[[int], int], besides: int, room: float) -> Callable[[int], bool]:
    """Whether what so many rows take, and `besides` what else there will be, is within their share of the room."""
    return lambda rows: taken(rows) + besides <= SHARE * room


def fits_by_trial(
    step: Callable[[int], None], trained: Sequence[nn.Parameter], besides: int, device: torch.device
) -> Callable[[int], bool]:
    """Whether `step` runs on so many rows while all gradients and `besides` bytes are there; it leaves nothing."""

    def fits(rows: int) -> bool:
        runs = _runs(rows)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return runs

    def _runs(rows: int) -> bool:
        try:
            with _reserved(trained, besides + _margin(device), device):
                step(rows)
        except (MemoryError, RuntimeError) as error:
            if not is_exhaustion(error):
                raise
            return False
        return True

    return fits


@contextmanager
def _reserved(trained: Sequence[nn.Parameter], size: int, device: torch.device) -> Iterator[None]:
    """Inside there are gradients, and a block of so many bytes; afterwards neither."""
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
    """Bytes of the device's memory that this process may still take; so many share the machine's."""
    if device.type != "cuda":
        return min(_machine_available(), _cgroup_available()) / processes
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _machine_available() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all of it, of which a share will be taken
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What its limit leaves, infinite without one. Cached files count as free, as they do for the machine."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        told = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - used + int(told["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf
