"""How a policy is judged: fixed prompts, fixed noise, the ODE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
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

    def shows(self, number: int) -> list[int]:
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

    def followed_by(self, more: Shown) -> Shown:
        """These and then those of a later batch."""
        scores = {name: torch.cat([self.scores[name], values]) for name, values in more.scores.items()}
        return Shown(torch.cat([self.images, more.images]), self.prompts + more.prompts, scores)
