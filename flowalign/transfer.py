"""Asynchronous copies between CPU memory and an accelerator.

A CUDA device reads and writes page-locked memory itself. PyTorch's allocator does not reuse such memory before the copy
is done, but until then the source must not be written to, and a destination on the CPU must not be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_for(shape: Sequence[int], device: torch.device | str) -> Tensor:
    """An uninitialised float32 tensor on the CPU, page-locked if its values will be copied to a CUDA device."""
    return torch.empty(*shape, pin_memory=torch.device(device).type == "cuda")


def to_device(t: Tensor, device: torch.device | str) -> Tensor:
    """t on `device`; itself if it is there. Copies of page-locked memory are asynchronous: do not write to t again."""
    return t.to(device, non_blocking=t.is_pinned())


def swap(these: Sequence[Tensor], those: Sequence[Tensor]) -> None:
    """Swap values in place, pair by pair, across devices. Synchronises with the CPU before it returns."""
    for this, that in zip(these, those, strict=True):
        copy = this.clone()
        this.copy_(that, non_blocking=True)
        that.copy_(copy, non_blocking=True)
    for device in {t.device for t in (*these, *those) if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
