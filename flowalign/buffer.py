"""The training points of the current epoch, and the loader of indices into them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flowalign.flow import at_least_float32
from flowalign.geometry import Geometry
from flowalign.keyed import TURN, keyed_generator
from flowalign.types import Conditioning, Point


class Buffer:
    """The points of one epoch on the training device. Conditioning is stored once per prompt; points refer to it."""

    def __init__(self) -> None:
        self.epoch = -1

    def fill(self, epoch: int, points: Point, cond: Conditioning, prompt_of_point: Tensor) -> None:
        """Store an epoch's points. cond has one row per prompt; prompt_of_point (points,) is the row of each point."""
        if len(prompt_of_point) != len(points.x):
            raise ValueError(f"{len(points.x)} points need as many prompt rows (got {len(prompt_of_point)}).")
        self.epoch, self.points, self.cond, self.prompt_of_point = epoch, points, cond, prompt_of_point

    def clear(self) -> None:
        """Free the points, before memory is needed for those of the next epoch."""
        if self.epoch >= 0:
            del self.points, self.cond, self.prompt_of_point
        self.epoch = -1

    def gather(self, idx: Tensor) -> tuple[Point, Conditioning]:
        """Points idx (b,), on any device, with their conditioning. States stored in 16 bits are returned in float32."""
        idx = idx.to(self.points.x.device)
        p = self.points.index(idx)
        x_next = None if p.x_next is None else at_least_float32(p.x_next)
        return replace(p, x=at_least_float32(p.x), x_next=x_next), self.cond.index(self.prompt_of_point[idx])


class IndexLoader:
    """Loader of (micro,) index tensors, in an order that depends on (seed, epoch, rank) only.

    Samples, or groups where the loss couples them, are shuffled and split into updates; all points of a sample belong
    to the same optimiser step, as in the methods' own code. This is not a torch DataLoader, which draws from the global
    generator and would break exact resumption.
    """

    def __init__(self, geometry: Geometry, seed: int, rank: int) -> None:
        self.geometry, self.seed, self.rank, self.epoch = geometry, seed, rank, 0
        self.sampler = self  # Lightning calls loader.sampler.set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.geometry.batches_per_epoch

    def __iter__(self) -> Iterator[Tensor]:
        g = self.geometry
        members, steps = torch.arange(g.unit), torch.arange(g.points_per_sample)
        for turn in range(g.batch.passes):
            generator = keyed_generator(self.seed, self.epoch, self.rank, TURN + turn)
            for part in torch.randperm(g.units_local, generator=generator).chunk(g.batch.updates):
                samples = (part[:, None] * g.unit + members).flatten()
                points = samples[:, None] * g.points_per_sample + steps
                # Step-major, so that a micro-batch spans samples rather than neighbouring states of one sample, unless
                # the loss needs all states of a sample together.
                yield from (points if g.together == "sample" else points.T).flatten().split(g.micro)
