"""The objective reward and the measures that are watched but never optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.base import Reward


class Scorer:
    """`objective` is trained on; `held_out` is only looked at, so that a hacked objective shows."""

    def __init__(self, objective: Reward, held_out: Mapping[str, Reward] | None = None) -> None:
        self.objective, self.held_out = objective, dict(held_out or {})
        if "reward" in self.held_out:
            raise ValueError("a held-out measure cannot be called `reward`: that is the objective's name.")

    def reward(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float32 of the objective; NaN = could not be scored."""
        return self._call(self.objective, media, prompts)

    def all(self, media: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Objective under "reward", and every held-out measure under its name; (B,) each."""
        held_out = {name: self._call(reward, media, prompts) for name, reward in self.held_out.items()}
        return {"reward": self.reward(media, prompts), **held_out}

    @staticmethod
    def _call(reward: Reward, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = reward(media, [p.text for p in prompts], [p.metadata for p in prompts])
        if scores.shape != (len(prompts),):
            raise ValueError(
                f"{type(reward).__name__} returned scores of shape {tuple(scores.shape)} for {len(prompts)} "
                "samples: a reward gives one number a sample."
            )
        return scores.to(media.device, torch.float32)
