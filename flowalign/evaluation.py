"""How a policy is judged: fixed prompts, fixed noise, the ODE."""

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
    """`weights` says whether the live network or its moving average is judged; `shown` pictures go into the grids."""

    sampling: Sampling
    num_val: int = 128
    num_test: int = 512
    shown: int = 16
    weights: Literal["live", "ema"] = "live"
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("num_val", "num_test", "shown"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} counts pictures, from 1 on (got {getattr(self, name)}).")
        if self.seed < 0:
            raise ValueError(f"seed is a number from 0 on (got {self.seed}).")

    @property
    def copy(self) -> str | None:
        return None if self.weights == "live" else self.weights

    def shown_indices(self, number: int) -> list[int]:
        """Which of `number` pictures go into the grids: one of each stretch of the list, drawn, always the same.

        Prompt files repeat themselves at a period (kinds in turn, wordings of one scene), so a fixed stride would too.
        """
        stretch = max(number // self.shown, 1)
        offsets = np.random.default_rng(self.seed).integers(stretch, size=self.shown)
        return [i * stretch + int(offsets[i]) for i in range(min(self.shown, number))]


class Positions:
    """Loader of (b,) positions in the evaluation set, dealt to ranks round-robin.

    Every rank has equally many, since ranks that share a network have to ask it together. Where `number` does not
    divide, the last ones lie beyond the set: such a picture is made and counted nowhere.
    """

    def __init__(self, number: int, batch_size: int, rank: int, world_size: int) -> None:
        self.mine = torch.arange(rank, -(-number // world_size) * world_size, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.mine.split(self.batch_size))


def stills(media: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as they are; of videos (B, F, 3, H, W) the middle frame."""
    return media if media.ndim == 4 else media[:, media.shape[1] // 2]


@dataclass
class Shown:
    """Some pictures of an evaluation, with what they were asked to be and how they scored."""

    images: Tensor
    """(n, 3, H, W) on the CPU, in [0, 1]."""
    prompts: list[str]
    scores: dict[str, Tensor]
    """(n,) each."""
    places: list[int] = field(default_factory=list)
    """Where in the evaluation set they are; empty of any other pictures."""

    def concat(self, more: Shown) -> Shown:
        """These and then those of a later batch, or of another rank."""
        scores = {name: torch.cat([self.scores[name], values]) for name, values in more.scores.items()}
        images, places = torch.cat([self.images, more.images]), self.places + more.places
        return Shown(images, self.prompts + more.prompts, scores, places)

    def in_order(self) -> Shown:
        """By their places."""
        order = sorted(range(len(self.places)), key=self.places.__getitem__)
        scores = {name: values[order] for name, values in self.scores.items()}
        return Shown(self.images[order], [self.prompts[i] for i in order], scores, sorted(self.places))


def gather_shown(mine: Shown | None, first: bool) -> Shown | None:
    """Those of all ranks, in order, on the first one; None on the others, and of nothing. All ranks call it together.

    Pictures are sent in 8 bits a value, in which they are shown.
    """
    parts: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(mine and replace(mine, images=(mine.images * 255).round().byte()), parts)
    there: list[Shown] = [part for part in parts or [] if part is not None]
    if not there:
        return None
    whole = reduce(Shown.concat, there)
    return replace(whole, images=whole.images / 255).in_order()
