"""The reward protocol, and base classes of rewards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowalign.rewards.errors import RewardError as RewardError

Metadata = Sequence[dict[str, Any]]


class Reward(Protocol):
    """Maps each sample to a number, higher is better. Any callable will do, for example a plain function.

    Optional: `check_prompt(prompt, metadata)` raises ValueError for a prompt that it cannot score whatever the image;
    all prompts are checked before a model is loaded.
    """

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score media (B, 3, H, W), or (B, F, 3, H, W) for videos, in [0, 1] → (B,) float32.

        NaN means that a sample could not be scored: it is excluded from training, unlike a sample with a score of 0.
        """
        ...


class FrameReward(ABC):
    """Base class for rewards of single images. A video scores the mean of its frames; non-finite media score NaN."""

    @abstractmethod
    def score(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score images (N, 3, H, W) float32 in [0, 1], on the device of the media → (N,); NaN = could not be scored."""

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """See `Reward`. Raises ValueError for media of another layout or range."""
        videos, finite = as_videos(media, prompts, metadata)
        scores = videos.new_full((len(videos),), torch.nan)
        if not finite.any():
            return scores
        frames = videos.shape[1]
        which = [i for i in finite.nonzero().flatten().tolist() for _ in range(frames)]
        judged = videos if finite.all() else videos[finite]
        found = self.score(judged.flatten(0, 1), [prompts[i] for i in which], [metadata[i] for i in which])
        scores[finite] = found.to(scores).unflatten(0, (-1, frames)).mean(dim=1)
        return scores


class RewardWrapper:
    """Base class for wrappers of another reward; its optional methods are called."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def self_check(self) -> None:
        """Run the wrapped reward's self-check, if it has one."""
        self._delegate("self_check")

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        """Check a prompt for the wrapped reward, if it does so."""
        self._delegate("check_prompt", prompt, metadata)

    def close(self) -> None:
        """Close the wrapped reward, if it has a `close`."""
        self._delegate("close")

    def _delegate(self, name: str, *arguments: Any) -> None:
        if method := getattr(self.reward, name, None):
            method(*arguments)


def as_videos(media: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Tensor, Tensor]:
    """Media as videos (B, F, 3, H, W) float32 in [0, 1], F = 1 for images, and a mask (B,) of the finite ones.

    Raises ValueError for another layout or range, or if there is not one prompt and metadata entry per sample.
    """
    if media.ndim not in (4, 5) or media.shape[-3] != 3:
        raise ValueError(f"a reward takes media (B, 3, H, W) or (B, F, 3, H, W); got {tuple(media.shape)}")
    if not len(media) == len(prompts) == len(metadata):
        raise ValueError(
            f"{len(media)} media with {len(prompts)} prompts and {len(metadata)} metadata entries; one each is needed"
        )
    videos = media.detach().float()
    videos = videos if media.ndim == 5 else videos[:, None]
    values = videos.flatten(1)
    low, high = values.amin(1), values.amax(1)  # NaN if a value is; isfinite would take several times as long
    finite = low.isfinite() & high.isfinite()
    if (low[finite] < -1e-3).any() or (high[finite] > 1 + 1e-3).any():
        raise ValueError(
            f"media must lie in [0, 1]; got values from {low[finite].min():.3g} to {high[finite].max():.3g}"
        )
    return videos.clamp(0, 1), finite  # beyond [0, 1] is only rounding, as checked above; NaN stays
