"""Rewards of a rollout, which come while it goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from flowalign.scoring.scorer import Scorer
from flowalign.scoring.seen import Seen
from flowalign.scoring.turns import Scores, Turns


class Coming:
    """Rewards of the samples of a rank in an epoch; they wait in `turns`, whose owner cancels them after a failure."""

    def __init__(self, scorer: Scorer, turns: Turns, epoch: int) -> None:
        self.scorer, self.turns, self.epoch = scorer, turns, epoch
        self.here: list[Tensor] = []

    def add(self, seen: Seen) -> None:
        """The next samples; raises what a reward has raised of earlier ones."""
        self.turns.add(self.scorer.start(seen), self._arrived)

    def _arrived(self, scores: Scores) -> None:
        self.here.append(self.scorer.stacked(scores))

    def mean(self) -> float | None:
        """Of their weighted sums so far, None before the first."""
        return float(self.scorer.combined(torch.cat(self.here), self.epoch).nanmean()) if self.here else None

    def all(self) -> Tensor:
        """(B, R), waited for; raises what a reward has raised."""
        self.turns.finish()
        return torch.cat(self.here)
