"""What a reward is called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.types import Conditioning


@dataclass(frozen=True)
class Latents:
    """Final latents and their conditioning, for rewards that need no decoded images."""

    x0: Tensor
    """(B, …)"""
    cond: Conditioning
    """One row per sample."""

    def index(self, i: slice) -> Latents:
        """Rows i."""
        return Latents(self.x0[i], self.cond.index(i))


@dataclass(frozen=True)
class RewardInput:
    """A batch of samples, with media and latents only as far as the rewards need them."""

    prompts: Sequence[Prompt]
    media: Tensor | None = None
    """(B, 3, H, W) or (B, F, 3, H, W) in [0, 1]."""
    latents: Latents | None = None
    groups: Tensor | None = None
    """(B,) group numbers: a groupwise reward compares the samples of a group, which are neighbours."""

    @property
    def device(self) -> torch.device:
        """The device that holds the samples."""
        if self.media is not None:
            return self.media.device
        return torch.device("cpu") if self.latents is None else self.latents.x0.device

    def index(self, i: slice) -> RewardInput:
        """Rows i."""
        return RewardInput(
            self.prompts[i],
            None if self.media is None else self.media[i],
            None if self.latents is None else self.latents.index(i),
            None if self.groups is None else self.groups[i],
        )

    def split(self, size: int | None, whole: bool) -> Iterator[RewardInput]:
        """Split into parts of at most `size` samples. With `whole` parts are whole groups, and hold at least one."""
        ends = list(range(1, len(self.prompts) + 1))
        if whole and self.groups is not None:
            ends = [i for i in ends if i == len(self.prompts) or self.groups[i] != self.groups[i - 1]]
        start = 0
        for end, following in zip(ends, [*ends[1:], None], strict=True):
            if following is None or (size is not None and following - start > size):
                yield self.index(slice(start, end))
                start = end
