"""Advantages as deviations from the group mean."""

from typing import Literal

from torch import Tensor

from flowalign.credit.base import Credit, Groups, check_eps, standardised, weighted


class GroupCredit(Credit):
    """(r - mean of its group) / (std + eps), as in Flow-GRPO (arXiv:2505.05470).

    std="group" is the standard deviation within the group. std="global" is that of the raw rewards of the whole epoch,
    including differences between prompts; it keeps small differences within a group small. With several rewards,
    aggregate="rewards" sums them first, and "advantages" sums the advantages of each, as in MixGRPO.
    """

    def __init__(
        self,
        std: Literal["group", "global"] = "global",
        eps: float = 1e-4,
        ddof: int = 0,
        aggregate: Literal["rewards", "advantages"] = "rewards",
        floor: bool = False,
    ) -> None:
        """ddof: 0 for the population std, 1 for the unbiased one; floor: divide by max(std, eps) instead."""
        if std not in ("group", "global"):
            raise ValueError(f'std is "group" or "global" (got {std!r}).')
        if aggregate not in ("rewards", "advantages"):
            raise ValueError(f'aggregate is "rewards" or "advantages" (got {aggregate!r}).')
        if ddof not in (0, 1):
            raise ValueError(f"ddof is 0 for the population's deviation or 1 for the unbiased one (got {ddof}).")
        check_eps(eps)
        self.std = std
        self.eps = eps
        self.ddof = ddof
        self.aggregate = aggregate
        self.floor = floor

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        if self.aggregate == "rewards":
            return self._advantage(weighted(rewards.T, weights), groups)
        return weighted([self._advantage(r, groups) for r in rewards.T], weights)

    def _advantage(self, r: Tensor, groups: Groups) -> Tensor:
        pool = groups if self.std == "group" else groups.everyone()
        return standardised(r, groups, pool, self.eps, self.floor, self.ddof)
