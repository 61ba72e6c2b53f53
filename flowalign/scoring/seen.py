"""What rewards may look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.types import Conditioning


@dataclass(frozen=True)
class Latents:
    """What pictures were decoded from, for rewards that need no decoding."""

    x0: Tensor
    """(B, …) final latents."""
    cond: Conditioning
    """One row a sample."""

    def index(self, i: slice) -> Latents:
        """Rows i."""
        return Latents(self.x0[i], self.cond.index(i))


@dataclass(frozen=True)
class Seen:
    """Some samples, and as much of them as their rewards need."""

    prompts: Sequence[Prompt]
    media: Tensor | None = None
    """(B, 3, H, W) or (B, F, 3, H, W) in [0, 1]."""
    latents: Latents | None = None
    groups: Tensor | None = None
    """(B,) samples with the same number are compared; they are neighbours."""

    @property
    def device(self) -> torch.device:
        """Where the samples are."""
        if self.media is not None:
            return self.media.device
        return torch.device("cpu") if self.latents is None else self.latents.x0.device

    def index(self, i: slice) -> Seen:
        """Rows i."""
        return Seen(
            self.prompts[i],
            None if self.media is None else self.media[i],
            None if self.latents is None else self.latents.index(i),
            None if self.groups is None else self.groups[i],
        )

    def split(self, size: int | None, whole: bool) -> Iterator[Seen]:
        """At most `size` samples at a time, or with `whole` as many whole groups as fit, and one at least."""
        ends = list(range(1, len(self.prompts) + 1))
        if whole and self.groups is not None:
            ends = [i for i in ends if i == len(self.prompts) or self.groups[i] != self.groups[i - 1]]
        start = 0
        for end, following in zip(ends, [*ends[1:], None], strict=True):
            if following is None or (size is not None and following - start > size):
                yield self.index(slice(start, end))
                start = end
