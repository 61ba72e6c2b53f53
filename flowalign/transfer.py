"""Copies between the machine's memory and an accelerator's that wait no more than they have to.

Page-locked memory is read and written by a CUDA device itself. PyTorch's allocator gives it to nobody else before such
a copy is done; but what is still on its way must be neither written to nor, towards the machine, read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_for(shape: Sequence[int], device: torch.device | str) -> Tensor:
    """An empty float32 tensor on the CPU for numbers that go to `device`, page-locked if that is a CUDA device."""
    return torch.empty(*shape, pin_memory=torch.device(device).type == "cuda")


def to_device(t: Tensor, device: torch.device | str) -> Tensor:
    """t on `device`: itself if it is there. Nobody waits for page-locked memory, so t must not be written to again."""
    return t.to(device, non_blocking=t.is_pinned())


def swap(these: Sequence[Tensor], those: Sequence[Tensor]) -> None:
    """Swaps values in place, pair by pair, wherever they are; done when it returns, as far as the CPU can see."""
    for this, that in zip(these, those, strict=True):
        held = this.clone()
        this.copy_(that, non_blocking=True)
        that.copy_(held, non_blocking=True)
    for device in {t.device for t in (*these, *those) if t.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
