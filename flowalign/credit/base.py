"""Base class of credit, with the handling of missing scores, groups and their statistics. All in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class Credit(ABC):
    """Maps rewards to advantages. N samples, R rewards; the samples of a group are compared with each other."""

    def __call__(
        self, rewards: Tensor, group: Tensor, valid: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """rewards (N,) or (N, R), group ids (N,), weights (R,) or None for ones → advantages (N,) in float64.

        A sample with a missing score (NaN, or valid=False) is excluded from all statistics and gets 0. A reward with
        weight 0 is ignored, and so are its NaNs. A group with fewer than two scores, or equal ones, gets exactly 0.
        """
        return self._credit(*prepare(rewards, group, valid, weights))

    @abstractmethod
    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """rewards (N, R) with 0 for missing scores, weights (R,) → advantages (N,)."""

    def stats(
        self, rewards: Tensor, group: Tensor, valid: Tensor | None = None, weights: Tensor | None = None
    ) -> dict[str, float]:
        """Diagnostics of this kind of credit by metric name; empty by default."""
        del rewards, group, valid, weights
        return {}


def prepare(
    rewards: Tensor, group: Tensor, valid: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Groups]:
    """Drop rewards with weight 0. Return rewards (N, R) in float64, 0 where missing, weights (R,), and groups."""
    r = rewards.double().reshape(len(rewards), -1)
    w = torch.ones_like(r[0]) if weights is None else weights.to(r)
    if w.shape != r.shape[1:]:
        raise ValueError(f"{r.shape[1]} rewards need as many weights (got {len(w)}).")
    if not w.any():
        raise ValueError("every reward has weight 0, so there is nothing to give credit for.")
    r, w = r[:, w != 0], w[w != 0]
    if bool(r.isinf().any()):
        raise ValueError("a reward is infinite; a reward function returns NaN for a sample that it cannot score.")
    scored = ~r.isnan().any(dim=1)
    groups = Groups.of(group, scored if valid is None else scored & valid)
    return torch.where(groups.valid[:, None], r, 0.0), w, groups


@dataclass(frozen=True)
class Groups:
    """Groups of N samples. A statistic of x (N,) within groups is (N,) too: each sample gets that of its group."""

    member: Tensor
    """(N,) group index of each sample, 0..G-1."""
    valid: Tensor
    """(N,) bool: the samples that count in the statistics."""

    @staticmethod
    def of(ids: Tensor, valid: Tensor | None = None) -> Groups:
        """Groups of equal `ids` (N,), which may be any numbers. All samples count unless `valid` (N,) is given."""
        member = torch.unique(ids, return_inverse=True)[1]
        return Groups(member, torch.ones_like(member, dtype=torch.bool) if valid is None else valid)

    @property
    def number(self) -> int:
        """Number of groups, G."""
        return int(self.member.max()) + 1

    def everyone(self) -> Groups:
        """All samples as one group."""
        return replace(self, member=torch.zeros_like(self.member))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the group."""
        total = torch.zeros(self.number, dtype=x.dtype, device=x.device)
        return total.index_add_(0, self.member, torch.where(self.valid, x, 0))[self.member]

    def count(self) -> Tensor:
        """Number of samples that count, in float64: 1 / an integer tensor would be float32."""
        return self.sum(torch.ones_like(self.member, dtype=torch.float64))

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the group; NaN if no sample of it counts."""
        return self.sum(x) / self.count()

    def std(self, x: Tensor, ddof: int = 0) -> Tensor:
        """Standard deviation within the group, of the population or unbiased (ddof=1)."""
        return (self.sum((x - self.mean(x)) ** 2) / (self.count() - ddof)).sqrt()

    def average(self, x: Tensor) -> Tensor:
        """Mean over groups, (), of a group statistic x (N,); groups in which no sample counts are left out."""
        share = 1 / self.count()[self.valid]
        return (x[self.valid] * share).sum() / share.sum()

    def low(self, x: Tensor) -> Tensor:
        """Minimum of the group."""
        start = torch.zeros(self.number, dtype=x.dtype, device=x.device)
        at = self.member[self.valid]
        return start.scatter_reduce(0, at, x[self.valid], "amin", include_self=False)[self.member]

    def high(self, x: Tensor) -> Tensor:
        """Maximum of the group."""
        return -self.low(-x)

    def alive(self, x: Tensor) -> Tensor:
        """(N,) bool: the sample counts and x differs within its group. Exact, unlike a std, which may be rounding."""
        return self.valid & (self.high(x) > self.low(x))


def check_eps(eps: float) -> None:
    """ValueError for an eps that could turn the sign of an advantage."""
    if not eps >= 0:
        raise ValueError(f"eps is added to a standard deviation and must be ≥ 0 (got {eps}).")


def standardised(x: Tensor, groups: Groups, pool: Groups, eps: float, floor: bool, ddof: int = 0) -> Tensor:
    """(x - group mean) / (std of the pool + eps), or over max(std, eps) with floor; 0 in a group without spread."""
    std = pool.std(x, ddof)
    scale = std.clamp(min=eps) if floor else std + eps
    # torch.where, not a product with a mask: the unselected branch may hold 0/0.
    return torch.where(groups.alive(x), (x - groups.mean(x)) / scale, 0.0)


def weighted(rewards: Sequence[Tensor] | Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k r_k of R tensors (N,), added term by term so that equal samples have equal sums to the last bit."""
    return sum((w * r for w, r in zip(weights, rewards, strict=True)), start=weights.new_zeros(()))


def group_stats(
    rewards: Tensor, group: Tensor, valid: Tensor | None = None, weights: Tensor | None = None
) -> dict[str, float]:
    """Statistics of the weighted sum: mean, mean std within a group, fraction of groups without spread."""
    r, w, groups = prepare(rewards, group, valid, weights)
    total = weighted(r.T, w)
    return {
        "mean": float(total[groups.valid].mean()),
        "within_std": float(groups.average(groups.std(total))),
        "zero_std_fraction": 1 - len(groups.member[groups.alive(total)].unique()) / groups.number,
    }
