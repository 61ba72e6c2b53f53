"""Optimisers of other packages: whether a checkpoint can hold their state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowalign.tensors import split_tensors

PROBE = (64, 128)
"""Shape of a weight that is large enough for optimisers that keep the state of small ones in 32 bits."""


def check_state(make: Callable[[Sequence[nn.Parameter]], Optimizer], device: torch.device) -> None:
    """Raise ValueError for an optimiser whose state after a step has tensors of a class of their own.

    They would be written, and refused when a checkpoint is read, from which only plain tensors are taken.
    """
    weight = nn.Parameter(torch.zeros(PROBE, device=device))
    optimizer = make([weight])
    if type(optimizer).__module__.startswith("torch.optim."):
        return
    weight.grad = torch.zeros_like(weight)
    optimizer.step(lambda: 0.0)
    kinds = {type(t) for t in split_tensors(optimizer.state_dict()["state"])[1].values()} - {Tensor}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state in {names}, which could not be resumed from: use "
            "torch.optim.AdamW, or bitsandbytes.optim.AdamW8bit for a state in 8 bits."
        )
