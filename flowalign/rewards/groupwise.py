"""Rewards that compare the pictures of a prompt with each other, made from any reward of single samples.

What counts is the order alone, so that a reward's scale, drift and outliers do not (Pref-GRPO, arXiv:2508.20751).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import Reward, RewardWrapper


class WinRate(RewardWrapper):
    """Share of the other members of its group that a sample beats, (B,) in [0, 1]; a tie is half a win.

    Without a margin this is the rank in the group, the worst 0, the best 1, equals sharing their mean rank. NaN where
    the reward is NaN, and where nobody is left to compare with.
    """

    groupwise = True

    def __init__(self, reward: Reward, margin: float = 0.0) -> None:
        """margin: how much better a score must be to win."""
        if margin < 0:
            raise ValueError(f"margin is a difference of scores and at least 0 (got {margin}).")
        super().__init__(reward)
        self.margin = margin

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor) -> Tensor:
        """`groups` (B,): samples with the same id are compared."""
        scores = self.reward(media, prompts, metadata)
        return win_rate(wins(scores, self.margin), groups)


def wins(scores: Tensor, margin: float = 0.0) -> Tensor:
    """(B,) → (B, B): 1 where the row's sample beats the column's, ½ for a tie, 0 for a loss; NaN if either is NaN."""
    difference = scores[:, None] - scores[None, :]
    outcome = torch.where(difference.abs() <= margin, 0.5, (difference > 0).float())
    return outcome.masked_fill(difference.isnan(), torch.nan)


def win_rate(wins: Tensor, groups: Tensor) -> Tensor:
    """(B, B) outcomes, NaN where nothing is known, and (B,) ids → (B,) mean over the others of the group."""
    groups = groups.to(wins.device)
    known = (groups[:, None] == groups[None, :]) & ~wins.isnan()
    known.fill_diagonal_(False)
    return torch.where(known, wins, 0).sum(dim=1) / known.sum(dim=1)  # 0 / 0 is NaN, as it should be
