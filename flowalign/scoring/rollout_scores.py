"""The rewards of a rollout, collected while it is running."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.scoring.inputs import RewardInput
from flowalign.scoring.queue import ScoreQueue, Scores
from flowalign.scoring.scorer import Scorer


class RolloutScores:
    """Rewards of one rank's samples of an epoch. The owner of `queue` cancels it after a failure."""

    def __init__(self, scorer: Scorer, queue: ScoreQueue, epoch: int) -> None:
        self.scorer, self.queue, self.epoch = scorer, queue, epoch
        self.done: list[Tensor] = []

    def add(self, batch: RewardInput) -> None:
        """Start scoring the next samples. Reraises the exception of a reward that failed on earlier ones."""
        self.queue.add(self.scorer.start(batch), self._store)

    def _store(self, scores: Scores) -> None:
        self.done.append(self.scorer.stacked(scores))

    def mean(self) -> float | None:
        """Mean weighted sum of the scores so far, None before the first."""
        return float(self.scorer.combined(torch.cat(self.done), self.epoch).nanmean()) if self.done else None

    def all(self) -> Tensor:
        """Wait for all scores (B, R). Reraises the exception of a reward that failed."""
        self.queue.finish()
        return torch.cat(self.done)
