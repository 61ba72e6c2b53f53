"""Credit for the extremes of a group only: its best sample and, for pairs, its worst."""

import torch
from torch import Tensor

from flowalign.credit.base import Credit, Groups, weighted


class Best(Credit):
    """1 for the best of each group, -1 for the worst if `worst`, 0 for the others: best of K, and the pairs of DPO.

    Tied best samples share the 1 equally, tied worst samples the -1.
    """

    def __init__(self, worst: bool = False) -> None:
        self.worst = worst

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        r = weighted(rewards.T, weights)
        best = _split(r == groups.high(r), groups)
        return torch.where(groups.alive(r), best - _split(r == groups.low(r), groups) * self.worst, 0.0)


def _split(chosen: Tensor, groups: Groups) -> Tensor:
    """1 per group, split equally among its `chosen` (N,) bool samples: (N,)."""
    chosen = chosen.double()
    return chosen / groups.sum(chosen)
