"""Groupwise comparison of samples by any pointwise reward.

Only the order matters, so that scale, drift and outliers of the reward do not (Pref-GRPO, arXiv:2508.20751).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import Reward, RewardWrapper


class WinRate(RewardWrapper):
    """Fraction of the other members of its group that a sample beats, (B,) in [0, 1]; a tie is half a win.

    Without a margin this is the normalised rank in the group, from 0 (worst) to 1 (best), and ties share their mean
    rank. NaN if the reward is NaN or no other member has a score.
    """

    groupwise = True

    def __init__(self, reward: Reward, margin: float = 0.0) -> None:
        """margin: difference in score up to which two samples tie."""
        if margin < 0:
            raise ValueError(f"margin is a difference of scores and at least 0 (got {margin}).")
        super().__init__(reward)
        self.margin = margin

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor) -> Tensor:
        """`groups` (B,): samples with the same id are compared."""
        scores = self.reward(media, prompts, metadata)
        return win_rate(wins(scores, self.margin), groups)


def wins(scores: Tensor, margin: float = 0.0) -> Tensor:
    """(B,) → (B, B): 1 if the row's sample beats the column's, ½ for a tie, 0 for a loss; NaN if either is NaN."""
    difference = scores[:, None] - scores[None, :]
    outcome = torch.where(difference.abs() <= margin, 0.5, (difference > 0).float())
    return outcome.masked_fill(difference.isnan(), torch.nan)


def win_rate(wins: Tensor, groups: Tensor) -> Tensor:
    """Outcomes (B, B), NaN if unknown, and group ids (B,) → mean over the other members of the group, (B,)."""
    groups = groups.to(wins.device)
    known = (groups[:, None] == groups[None, :]) & ~wins.isnan()
    known.fill_diagonal_(False)
    return torch.where(known, wins, 0).sum(dim=1) / known.sum(dim=1)  # 0 / 0 = NaN: nobody to compare with
