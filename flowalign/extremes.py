"""Training on the best and the worst samples of each group only (`batch.extremes`)."""

from __future__ import annotations

import torch
from torch import Tensor


def best_and_worst(advantage: Tensor, valid: Tensor, group_size: int, members: int) -> Tensor:
    """Select `members` samples of each group, the better half of them from the top: (N,) bool.

    advantage (N,), valid (N,) bool, groups of `group_size` neighbours. Samples without a score rank between the best
    and the worst, so that they are selected only if their group has too few others.
    """
    worst = members // 2
    best = members - worst
    scored = advantage.masked_fill(~valid, -torch.inf).unflatten(0, (-1, group_size))
    place = scored.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    place = torch.where(place < best, place, place + group_size)
    place[~valid.unflatten(0, (-1, group_size))] = best
    rank = place.argsort(dim=1, stable=True).argsort(dim=1)
    return ((rank < best) | (rank >= group_size - worst)).flatten()
