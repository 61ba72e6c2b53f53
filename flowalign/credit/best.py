"""Only the extremes of a group: its best sample, and for pairs its worst."""

import torch
from torch import Tensor

from flowalign.credit.base import Credit, Groups, weighted


class Best(Credit):
    """1 for the best of each group, -1 for the worst if asked for, 0 for the others: best of K, and the pairs of DPO.

    Several best ones share the 1, several worst ones the -1.
    """

    def __init__(self, worst: bool = False) -> None:
        self.worst = worst

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        r = weighted(rewards.T, weights)
        best = _share(r == groups.high(r), groups)
        return torch.where(groups.alive(r), best - _share(r == groups.low(r), groups) * self.worst, 0.0)


def _share(chosen: Tensor, groups: Groups) -> Tensor:
    chosen = chosen.double()
    return chosen / groups.sum(chosen)
