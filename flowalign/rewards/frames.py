"""Subsampling of video frames, for reward models that are too slow to score all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import Reward, RewardWrapper


class Frames(RewardWrapper):
    """Passes `num` frames of each video, evenly spaced from the first to the last, to a reward; images are unchanged.

    A reward of single images then takes the mean over these frames.
    """

    def __init__(self, reward: Reward, num: int) -> None:
        if num < 1:
            raise ValueError(f"num is the number of frames to score, at least 1 (got {num}).")
        super().__init__(reward)
        self.num, self.groupwise = num, bool(getattr(reward, "groupwise", False))

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], **compared: Tensor) -> Tensor:
        if media.ndim == 5 and media.shape[1] > self.num:
            media = media[:, evenly_spaced(media.shape[1], self.num)]
        return self.reward(media, prompts, metadata, **compared)  # `compared`: the groups, for groupwise rewards


def evenly_spaced(frames: int, num: int) -> list[int]:
    """Indices of `num` evenly spaced frames including both ends; the middle one if num is 1."""
    if num == 1:
        return [frames // 2]
    return torch.linspace(0, frames - 1, num).round().long().tolist()
