"""What an optimiser keeps for its steps: how much, and whether a checkpoint can hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowalign.tensors import split_tensors

Make = Callable[[Sequence[nn.Parameter]], Optimizer]
PROBE = (256, 1024)
"""Shape of a weight that is large enough for optimisers that keep the state of small ones in 32 bits."""


def check_state(make: Make, device: torch.device) -> None:
    """Raise ValueError for an optimiser whose state has tensors of a class of their own.

    They would be written, and refused when a checkpoint is read, from which only plain tensors are taken.
    """
    optimizer, tensors = _stepped(make, device)
    if kinds := {type(t).__name__ for t in tensors if type(t) is not Tensor}:
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state in {', '.join(sorted(kinds))}, which could not be resumed "
            "from: use torch.optim.AdamW, or bitsandbytes.optim.AdamW8bit for a state in 8 bits."
        )


def state_share(make: Make, device: torch.device) -> float:
    """Bytes of state per byte of a large weight: 2 for AdamW."""
    return sum(t.nbytes for t in _stepped(make, device)[1]) / (4 * PROBE[0] * PROBE[1])


def _stepped(make: Make, device: torch.device) -> tuple[Optimizer, list[Tensor]]:
    """An optimiser after a step on a weight of its own, and the tensors of its state."""
    weight = nn.Parameter(torch.zeros(PROBE, device=device))
    optimizer = make([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step(lambda: 0.0)
    return optimizer, list(split_tensors(optimizer.state_dict()["state"])[1].values())
