"""Evaluation settings, the loader of an evaluation set, and the images that are shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flowalign.sampler import Sampling


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on fixed prompts with fixed noise and the ODE.

    weights: evaluate the live network or its moving average. shown: number of images in the grids.
    """

    sampling: Sampling
    num_val: int = 128
    num_test: int = 512
    shown: int = 16
    weights: Literal["live", "ema"] = "live"
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("num_val", "num_test", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of images and must be at least 1 (got {getattr(self, name)}).")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0 (got {self.seed}).")

    @property
    def copy(self) -> str | None:
        """Name of the frozen copy that is evaluated; None: the live weights."""
        return None if self.weights == "live" else self.weights

    def shown_indices(self, number: int) -> list[int]:
        """Indices of the images in the grids, out of `number`: a random one of each stretch of the list, but fixed.

        A fixed stride would be biased, since prompt files are often periodic (kinds in turn, wordings of one scene).
        """
        stretch = max(number // self.shown, 1)
        offsets = np.random.default_rng(self.seed).integers(stretch, size=self.shown)
        return [i * stretch + int(offsets[i]) for i in range(min(self.shown, number))]


class Positions:
    """Loader of (b,) positions in the evaluation set, dealt to ranks round-robin.

    Every rank has equally many, since ranks that share a network must evaluate it together. If `number` is not
    divisible, the last positions lie beyond the set: padding, which is generated but not counted.
    """

    def __init__(self, number: int, batch_size: int, rank: int, world_size: int) -> None:
        self.mine = torch.arange(rank, -(-number // world_size) * world_size, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.mine.split(self.batch_size))


def stills(media: Tensor) -> Tensor:
    """Images (B, 3, H, W) unchanged; the middle frame of videos (B, F, 3, H, W)."""
    return media if media.ndim == 4 else media[:, media.shape[1] // 2]


@dataclass
class Shown:
    """The shown images of an evaluation, with their prompts and scores."""

    images: Tensor
    """(n, 3, H, W) on the CPU, in [0, 1]."""
    prompts: list[str]
    scores: dict[str, Tensor]
    """(n,) each."""
    places: list[int] = field(default_factory=list)
    """Positions in the evaluation set; empty for images from elsewhere."""

    def concat(self, more: Shown) -> Shown:
        """Append those of a later batch or another rank."""
        scores = {name: torch.cat([self.scores[name], values]) for name, values in more.scores.items()}
        images, places = torch.cat([self.images, more.images]), self.places + more.places
        return Shown(images, self.prompts + more.prompts, scores, places)

    def in_order(self) -> Shown:
        """Sorted by position."""
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        scores = {name: values[order] for name, values in self.scores.items()}
        return Shown(self.images[order], [self.prompts[i] for i in order], scores, sorted(self.places))


def gather_shown(mine: Shown | None, first: bool) -> Shown | None:
    """Gather those of all ranks on the first one, sorted; None on the others, or if there are none. Collective.

    Images are sent in 8 bits, which is what is shown.
    """
    parts: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine and replace(mine, images=(mine.images * 255).round().byte()), parts)
    present: list[Shown] = [part for part in parts or [] if part is not None]
    if not present:
        return None
    joined = reduce(Shown.concat, present)
    return replace(joined, images=joined.images / 255).in_order()
