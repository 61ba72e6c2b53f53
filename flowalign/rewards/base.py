"""What a reward is."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Reward(Protocol):
    """One number per sample, higher is better."""

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """media (B, 3, H, W), or (B, F, 3, H, W) for videos, in [0, 1] → (B,) float32.

        NaN means "could not score": such a sample is left out, which a score of 0 would not do.
        """
        ...
