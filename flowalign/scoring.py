"""The objective reward and the measures that are watched but never optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.base import Reward


class Scorer:
    """`objective` is trained on; `held_out` is only looked at, so that a hacked objective shows.

    An objective may have several rewards, by name, each with its weight (1 unless given); credit then decides how they
    meet, and "reward" is their weighted sum.
    """

    def __init__(
        self,
        objective: Reward | Mapping[str, Reward],
        held_out: Mapping[str, Reward] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.objective = dict(objective) if isinstance(objective, Mapping) else {"reward": objective}
        self.held_out = dict(held_out or {})
        given = dict(weights or {})
        if unknown := sorted(given.keys() - self.objective.keys()):
            raise ValueError(f"weights are given to {unknown}, but the rewards are {sorted(self.objective)}.")
        self.weights = torch.tensor([float(given.get(name, 1.0)) for name in self.objective], dtype=torch.float64)
        if not self.weights.isfinite().all() or not self.weights.any():
            raise ValueError(f"the rewards need finite weights that are not all 0 (got {self.weights.tolist()}).")
        if "reward" in self.held_out or "reward" in self.objective and len(self.objective) > 1:
            raise ValueError("a measure cannot be called `reward`: that is the objective's name.")
        if twice := sorted(self.objective.keys() & self.held_out.keys()):
            raise ValueError(f"{twice} cannot be both trained on and held out.")

    @property
    def measures(self) -> list[str]:
        """Names of what `all` returns."""
        return list(dict.fromkeys(["reward", *self.objective, *self.held_out]))

    def rewards(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, R) float32 of the R rewards of the objective; NaN = could not be scored."""
        return torch.stack([self._call(reward, media, prompts) for reward in self.objective.values()], dim=1)

    def combined(self, rewards: Tensor) -> Tensor:
        """(B, R) to their weighted sum (B,); NaN if a reward that counts is missing."""
        counts = self.weights != 0
        return (rewards[:, counts] * self.weights[counts].to(rewards)).sum(dim=1)

    def all(self, media: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The weighted sum under "reward", and every reward and held-out measure under its name; (B,) each."""
        rewards = self.rewards(media, prompts)
        parts = dict(zip(self.objective, rewards.T, strict=True))
        held_out = {name: self._call(reward, media, prompts) for name, reward in self.held_out.items()}
        return parts | held_out | {"reward": self.combined(rewards)}

    @staticmethod
    def _call(reward: Reward, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = reward(media, [p.text for p in prompts], [p.metadata for p in prompts])
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"{type(reward).__name__} returned scores of shape {tuple(scores.shape)} for {len(prompts)} "
                "samples: a reward gives one number a sample."
            )
        return scores.to(media.device, torch.float32)
