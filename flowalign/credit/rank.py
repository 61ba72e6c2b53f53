"""Ranks instead of rewards (PaCo-GRPO, arXiv:2512.04784): only their order counts, not their distances."""

from typing import Literal

import torch
from torch import Tensor

from flowalign.credit.base import Credit, Groups
from flowalign.credit.group import GroupCredit


class Rank(Credit):
    """Each reward becomes its rank in the group, 0 (worst) to 1 (best); then GroupCredit of their weighted sum.

    Equal rewards share the mean of their ranks. ties="order" ranks them in the order of the samples, as PaCo's code
    does, so that a group of equal images has winners and losers.
    """

    def __init__(
        self,
        std: Literal["group", "global"] = "global",
        eps: float = 1e-6,
        ties: Literal["shared", "order"] = "shared",
    ) -> None:
        if ties not in ("shared", "order"):
            raise ValueError(f'ties is "shared" or "order" (got {ties!r}).')
        self.then = GroupCredit(std, eps, floor=True)
        self.ties: Literal["shared", "order"] = ties

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        ranks = torch.stack([ranked(r, groups, self.ties) for r in rewards.T], dim=1)
        return self.then._credit(ranks, weights, groups)


def ranked(r: Tensor, groups: Groups, ties: Literal["shared", "order"] = "shared") -> Tensor:
    """Rank of r within its group over (size - 1), (N,) in [0, 1]; 0 for samples that do not count."""
    member, rank = groups.member[groups.valid], torch.zeros_like(r)
    keys = torch.stack([member.to(r.dtype), r[groups.valid]], dim=1)
    if ties == "order":  # a third key, which breaks all ties
        keys = torch.cat([keys, torch.arange(len(keys), dtype=r.dtype, device=r.device)[:, None]], dim=1)
    # Classes of equal keys, sorted by group and score: a class comes after all smaller ones.
    _, tie, sizes = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    middle = sizes.cumsum(0) - (sizes + 1) / 2
    size = torch.bincount(member, minlength=groups.number)
    before = size.cumsum(0) - size
    rank[groups.valid] = (middle[tie] - before[member]).to(r.dtype) / (size[member] - 1).clamp(min=1)
    return rank
