"""Logarithms of the rewards that vary most, so that they do not dominate the others (PaCo-GRPO, arXiv:2512.04784)."""

from typing import Literal

import torch
from torch import Tensor

from flowalign.credit.base import Credit, Groups
from flowalign.credit.group import GroupCredit


class LogTame(Credit):
    """A reward whose std / mean over the epoch is above `threshold` becomes log(1 + r); then GroupCredit of the sum.

    threshold: "mean" or "median" of that ratio over the rewards, or a number. PaCo's code uses the tamed sum itself as
    the advantage; here it is normalised like any other reward.
    """

    def __init__(
        self,
        threshold: Literal["mean", "median"] | float = "median",
        std: Literal["group", "global"] = "global",
        eps: float = 1e-6,
    ) -> None:
        if isinstance(threshold, str) and threshold not in ("mean", "median"):
            raise ValueError(f'threshold is "mean", "median" or a number (got {threshold!r}).')
        self.threshold = threshold
        self.then = GroupCredit(std, eps, floor=True)

    def _credit(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        return self.then._credit(self.tamed(rewards, groups), weights, groups)

    def tamed(self, rewards: Tensor, groups: Groups) -> Tensor:
        """rewards (N, R), with log(1 + r) for those whose std / mean is above the threshold."""
        epoch = groups.everyone()
        h = torch.stack([epoch.std(r)[0] / (epoch.mean(r)[0] + 1e-6) for r in rewards.T])
        high = h > self._limit(h)
        if bool((rewards[:, high] <= -1).any()):
            raise ValueError(f"log(1 + r) needs rewards above -1 (lowest: {float(rewards[:, high].min()):.3g}).")
        return torch.where(high, rewards.log1p(), rewards)

    def _limit(self, h: Tensor) -> Tensor | float:
        if isinstance(self.threshold, str):
            return h.mean() if self.threshold == "mean" else h.quantile(0.5)
        return self.threshold
