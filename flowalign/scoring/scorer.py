"""The objective rewards and the measures that are watched but never optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.base import Reward
from flowalign.scoring.measure import Measure
from flowalign.scoring.seen import Latents, Seen
from flowalign.types import Conditioning


class Scorer:
    """`objective` is trained on; `held_out` is only looked at, so that a hacked objective shows.

    An objective may have several rewards, by name, each with its weight (1 unless given); credit then decides how they
    meet, and "reward" is their weighted sum.
    """

    def __init__(
        self,
        objective: Reward | Measure | Mapping[str, Reward | Measure],
        held_out: Mapping[str, Reward | Measure] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        named = objective if isinstance(objective, Mapping) else {"reward": objective}
        self.objective = {name: _measure(reward) for name, reward in named.items()}
        self.held_out = {name: _measure(reward) for name, reward in (held_out or {}).items()}
        given = dict(weights or {})
        if unknown := sorted(given.keys() - self.objective.keys()):
            raise ValueError(f"weights are given to {unknown}, but the rewards are {sorted(self.objective)}.")
        numbers = [float(given.get(name, measure.weight)) for name, measure in self.objective.items()]
        self.weights = torch.tensor(numbers, dtype=torch.float64)
        if not self.weights.isfinite().all() or not self.weights.any():
            raise ValueError(f"the rewards need finite weights that are not all 0 (got {self.weights.tolist()}).")
        if "reward" in self.held_out or "reward" in self.objective and len(self.objective) > 1:
            raise ValueError("a measure cannot be called `reward`: that is the objective's name.")
        if twice := sorted(self.objective.keys() & self.held_out.keys()):
            raise ValueError(f"{twice} cannot be both trained on and held out.")

    @property
    def measures(self) -> list[str]:
        """Names of what `all` returns."""
        return list(dict.fromkeys(["reward", *self._judged]))

    @property
    def _judged(self) -> dict[str, Measure]:
        """What an evaluation measures: its prompts have one picture each, so that nothing can be compared."""
        return {name: m for name, m in {**self.objective, **self.held_out}.items() if not m.groupwise}

    @property
    def groupwise(self) -> bool:
        """Whether a reward of the objective needs the whole group of a prompt at once."""
        return any(measure.groupwise for measure in self.objective.values())

    @property
    def sees_media(self) -> bool:
        """Whether a reward of the objective needs decoded pictures."""
        return not all(measure.sees_latents for measure in self.objective.values())

    def bind(self, model: Any) -> None:
        """Gives the model's adapter to the rewards that are made of the policy's own parts; before training, once."""
        for measure in {**self.objective, **self.held_out}.values():
            if bind := getattr(measure.reward, "bind", None):
                bind(model)

    def close(self) -> None:
        """Lets rewards end what they have started."""
        for measure in {**self.objective, **self.held_out}.values():
            if close := getattr(measure.reward, "close", None):
                close()

    def rewards(
        self,
        media: Tensor | None,
        prompts: Sequence[Prompt],
        latents: Latents | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:
        """(B, R) float32 of the R rewards of the objective; NaN = could not be scored.

        media may be None where `sees_media` says so; groups (B,) are the numbers of what is compared.
        """
        seen = Seen(prompts, media, latents, groups)
        return torch.stack([measure(seen) for measure in self.objective.values()], dim=1)

    def of_noisy(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The weighted sum of the objective on noisy latents x (B, …) at sigma (B,), with its gradient to x: (B,)."""
        counted = [(w, m) for w, m in zip(self.weights.tolist(), self.objective.values(), strict=True) if w]
        return torch.stack([w * m.reward.of_noisy(x, sigma, cond) for w, m in counted]).sum(dim=0)  # type: ignore

    def combined(self, rewards: Tensor) -> Tensor:
        """(B, R) to their weighted sum (B,); NaN if a reward that counts is missing."""
        return total(rewards, self.weights)

    def all(self, media: Tensor | None, prompts: Sequence[Prompt], latents: Latents | None = None) -> dict[str, Tensor]:
        """What an evaluation measures, by name, and the weighted sum of the objective under "reward"; (B,) each.

        Groupwise rewards are left out, of the sum too, which is NaN without any other.
        """
        seen = Seen(prompts, media, latents)
        found = {name: measure(seen) for name, measure in self._judged.items()}
        counted = [name for name in self.objective if name in found]
        if not counted:
            return found | {"reward": torch.full((len(prompts),), torch.nan)}
        weights = self.weights[[name in found for name in self.objective]]
        return found | {"reward": total(torch.stack([found[name] for name in counted], dim=1), weights)}


def total(rewards: Tensor, weights: Tensor) -> Tensor:
    """(B, R) times (R,) to (B,); NaN if a reward that counts is missing."""
    counts = weights != 0
    return (rewards[:, counts] * weights[counts].to(rewards)).sum(dim=1)


def _measure(reward: Reward | Measure) -> Measure:
    return reward if isinstance(reward, Measure) else Measure(reward)
