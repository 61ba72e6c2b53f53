"""Rewards and groups to advantages. Everything in float64; N samples, a group = the samples of one prompt."""

from typing import Literal

import torch
from torch import Tensor


class GroupCredit:
    """(r - mean of its group) / (std + eps), as in Flow-GRPO (arXiv:2505.05470).

    std="group" is the deviation within the group; std="global" that of the raw rewards of the whole epoch, differences
    between prompts included, which keeps small differences within a group small.
    """

    def __init__(self, std: Literal["group", "global"] = "global", eps: float = 1e-4, ddof: int = 0) -> None:
        if std not in ("group", "global"):
            raise ValueError(f'credit is normalised by std="group" or std="global" (got {std!r}).')
        self.std = std
        self.eps = eps
        self.ddof = ddof

    def __call__(self, rewards: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
        """rewards (N,) and group ids (N,) → advantages (N,) in float64.

        A sample without a score (NaN, or valid=False) is left out of every statistic and gets 0. So does a group with
        nothing to compare: fewer than two scores, or equal ones.
        """
        r, member, valid = _prepare(rewards, group, valid)
        pool = member if self.std == "group" else torch.zeros_like(member)
        count, _, ss = _moments(r, pool, valid)
        std = (ss / (count - self.ddof)).sqrt()[pool]
        _, mean, _ = _moments(r, member, valid)
        # torch.where, not a product with a mask: the branch left out may hold 0/0.
        alive = valid & _spread(r, member, valid)[member]
        return torch.where(alive, (r - mean[member]) / (std + self.eps), 0.0)


def weighted_sum(rewards: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """One reward out of several, (N,) in float64. A missing score (NaN) stays missing unless its weight is 0."""
    if rewards.keys() != weights.keys():
        raise ValueError(f"rewards {sorted(rewards)} and weights {sorted(weights)} must have the same names.")
    total = torch.zeros_like(next(iter(rewards.values())), dtype=torch.float64)
    for name, w in weights.items():
        if w != 0:
            total = total + w * rewards[name].double()
    return total


def group_stats(rewards: Tensor, group: Tensor) -> dict[str, float]:
    """Diagnostics: mean reward, mean deviation within a group, share of groups without any spread."""
    r, member, valid = _prepare(rewards, group, None)
    count, _, ss = _moments(r, member, valid)
    within = (ss / count).sqrt()[count > 0]
    return {
        "mean": r[valid].mean().item(),
        "within_std": within.mean().item(),
        "zero_std_fraction": 1 - _spread(r, member, valid).double().mean().item(),
    }


def _prepare(rewards: Tensor, group: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards in float64 with 0 for the missing ones, group numbers 0..G-1 and the samples that count, all (N,)."""
    r = rewards.double()
    if bool(r.isinf().any()):
        raise ValueError("a reward is infinite; a reward function says NaN for a sample that it cannot score.")
    valid = ~r.isnan() if valid is None else valid & ~r.isnan()
    member = torch.unique(group, return_inverse=True)[1]
    return torch.where(valid, r, 0.0), member, valid


def _moments(r: Tensor, member: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per group, (G,): number of scores, their mean, and the sum of squares about it."""
    size = int(member.max()) + 1
    count = torch.bincount(member[valid], minlength=size)
    mean = torch.zeros(size, dtype=r.dtype, device=r.device).index_add_(0, member, r) / count
    deviation = torch.where(valid, r - mean[member], 0.0)
    return count, mean, torch.zeros_like(mean).index_add_(0, member, deviation**2)


def _spread(r: Tensor, member: Tensor, valid: Tensor) -> Tensor:
    """Per group, (G,): whether two scores differ. Exact, unlike a std, which rounding can leave just above 0."""
    start = torch.zeros(int(member.max()) + 1, dtype=r.dtype, device=r.device)
    low = start.scatter_reduce(0, member[valid], r[valid], "amin", include_self=False)
    high = start.scatter_reduce(0, member[valid], r[valid], "amax", include_self=False)
    return high > low
