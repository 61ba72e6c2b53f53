"""One reward as a run calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import Reward
from flowalign.scoring.seen import Seen


class Measure:
    """A reward with what the run, not the reward, decides about it. A bare reward is a Measure with these defaults."""

    def __init__(self, reward: Reward, weight: float = 1.0, batch_size: int | None = None) -> None:
        """batch_size: samples in one call (groupwise: rounded to whole groups); None: as they come."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size counts the samples of one call and must be at least 1 (got {batch_size}).")
        self.reward = reward
        self.weight = weight
        self.batch_size = batch_size

    @property
    def groupwise(self) -> bool:
        """Whether a call needs the whole group of a prompt."""
        return bool(self._member("groupwise", False))

    @property
    def sees_latents(self) -> bool:
        """Whether it is called with latents, so that nothing is decoded for it."""
        return self._member("sees", "media") == "latents"

    def _member(self, name: str, otherwise: Any) -> Any:
        return getattr(self.reward, name, otherwise)

    @torch.no_grad()
    def __call__(self, seen: Seen) -> Tensor:
        """(B,) float32, where the samples are; NaN = could not be scored."""
        parts = [self._scores(part) for part in seen.split(self.batch_size, self.groupwise)]
        return torch.cat(parts)

    def _scores(self, seen: Seen) -> Tensor:
        texts, metadata = [p.text for p in seen.prompts], [p.metadata for p in seen.prompts]
        compared: dict[str, Any] = {"groups": seen.groups} if self.groupwise else {}
        if self.sees_latents:
            if seen.latents is None:
                raise ValueError(f"{self.described} scores latents, and only media are here.")
            where = seen.latents.x0.device
            scores = self.reward.of_latents(seen.latents.x0, seen.latents.cond, texts, metadata, **compared)  # type: ignore
        else:
            if seen.media is None:
                raise ValueError(f"{self.described} scores media, and nothing was decoded.")
            where = seen.media.device
            scores = self.reward(seen.media, texts, metadata, **compared)
        if scores.shape != (len(texts),):
            raise ValueError(
                f"{self.described} returned scores of shape {tuple(scores.shape)} for {len(texts)} samples: a reward "
                "gives one number a sample."
            )
        return scores.to(where, torch.float32)

    @property
    def described(self) -> str:
        """The name of the class, or of a plain function."""
        function = getattr(self.reward, "func", self.reward)  # of functools.partial
        return getattr(function, "__name__", type(function).__name__)
