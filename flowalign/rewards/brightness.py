"""Image brightness: a reward that is easily hacked at the cost of everything else, to test what detects hacking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import FrameReward, RewardError


class Brightness(FrameReward):
    """Mean over all pixels and channels, in [0, 1]."""

    def score(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del prompts, metadata
        return pictures.flatten(1).mean(dim=1)

    def self_check(self) -> None:
        """Raise RewardError unless white scores higher than black."""
        black, white = self(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8), [""] * 2, [{}] * 2).tolist()
        if not white > black:
            raise RewardError(f"white scores {white} and black {black}.")
