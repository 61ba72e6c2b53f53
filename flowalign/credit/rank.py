"""Ranks instead of rewards (PaCo-GRPO, arXiv:2512.04784): what counts is the order, not the distance."""

from typing import Literal

import torch
from torch import Tensor

from flowalign.credit.base import Credit, Groups
from flowalign.credit.group import GroupCredit


class Rank(Credit):
    """Each reward becomes its rank in the group, 0 (worst) to 1 (best); then GroupCredit of their weighted sum.

    Equal rewards share the mean of their ranks; PaCo's code puts them in the order of the samples.
    """

    def __init__(self, std: Literal["group", "global"] = "global", eps: float = 1e-6) -> None:
        self.then = GroupCredit(std, eps, floor=True)

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        ranks = torch.stack([ranked(r, groups) for r in rewards.T], dim=1)
        return self.then._credit(ranks, weights, groups)


def ranked(r: Tensor, groups: Groups) -> Tensor:
    """Rank of r within its group over (size - 1), (N,) in [0, 1]; 0 for what does not count."""
    member, rank = groups.member[groups.valid], torch.zeros_like(r)
    # Classes of equal scores, in the order of group and score: a class sits behind all smaller ones.
    keys = torch.stack([member.to(r.dtype), r[groups.valid]], dim=1)
    _, tie, ties = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    middle = ties.cumsum(0) - (ties + 1) / 2
    size = torch.bincount(member, minlength=groups.number)
    before = size.cumsum(0) - size
    rank[groups.valid] = (middle[tie] - before[member]).to(r.dtype) / (size[member] - 1).clamp(min=1)
    return rank
