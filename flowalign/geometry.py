"""The batch plan: what the user says (prompts, group size, micro-batch, updates) and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What an epoch is made of. `micro` counts training points (sample × step) in one forward and backward pass."""

    prompts: int
    group_size: int
    micro: int
    updates: int = 1
    passes: int = 1

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"batch.group_size={self.group_size} gives every advantage 0, so nothing can be learnt: use at "
                "least 2 (8 to 24 are usual)."
            )
        for name in ("prompts", "micro", "updates", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"batch.{name} must be at least 1 (got {getattr(self, name)}).")


def nearest_divisor(number: int, wanted: float) -> int:
    """The divisor of `number` closest to `wanted`, the larger of two."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), -d))


@dataclass(frozen=True)
class Geometry:
    """The plan of one rank, derived once and fixed for the run.

    together: the rows that share a micro-batch (Algorithm.together). members: how many of each group are trained on,
    None for all. whole: groups are dealt whole to the ranks; a coupling by groups and a choice of members need that.
    """

    batch: Batch
    points_per_sample: int
    world_size: int = 1
    together: Literal["point", "sample", "group"] = "point"
    members: int | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        b = self.batch
        if self.members is not None and self.members > b.group_size:
            raise ValueError(
                f"{self.members} members of each group are trained on, more than batch.group_size={b.group_size}: use "
                f"batch.group_size={self.members} or more."
            )
        if self.samples // self.block % self.world_size:
            how = " in whole groups" if self.block > 1 else ""
            raise ValueError(
                f"{b.prompts} prompts × {b.group_size} = {self.samples} samples cannot be dealt to {self.world_size} "
                f"ranks{how}: use batch.prompts={self._nearest_prompts()}."
            )
        if self.units_local % b.updates:
            kind = "groups" if self.together == "group" else "samples"
            raise ValueError(
                f"{self.units_local} {kind} on a rank cannot be cut into batch.updates={b.updates} equal parts: the "
                f"nearest possible number is {nearest_divisor(self.units_local, b.updates)}."
            )
        if self.points_per_update % b.micro or b.micro % self.coupled:
            why = f" of whole {self.together}s of {self.coupled} points" if self.coupled > 1 else ""
            nearest = self.coupled * nearest_divisor(self.points_per_update // self.coupled, b.micro / self.coupled)
            raise ValueError(
                f"{self.points_per_update} training points of an update cannot be cut into batch.micro={b.micro}{why}: "
                f"the nearest possible number is {nearest}."
            )

    def _nearest_prompts(self) -> int:
        size = self.batch.group_size // self.block
        fits = [p for p in range(1, self.batch.prompts + self.world_size + 1) if p * size % self.world_size == 0]
        return min(fits, key=lambda p: (abs(p - self.batch.prompts), -p))

    @property
    def block(self) -> int:
        """Neighbouring samples that go to the same rank."""
        whole = self.whole or self.together == "group" or self.members is not None
        return self.batch.group_size if whole else 1

    @property
    def samples(self) -> int:
        """Samples of an epoch on all ranks together."""
        return self.batch.prompts * self.batch.group_size

    @property
    def samples_local(self) -> int:
        """Samples that a rank makes."""
        return self.samples // self.world_size

    @property
    def group_members(self) -> int:
        """Samples of a group that are trained on."""
        return self.batch.group_size if self.members is None else self.members

    @property
    def trained_local(self) -> int:
        """Samples that a rank trains on."""
        return self.samples_local * self.group_members // self.batch.group_size

    @property
    def unit(self) -> int:
        """Neighbouring samples that serve the same update: one, or a group."""
        return self.group_members if self.together == "group" else 1

    @property
    def units_local(self) -> int:
        """Groups or samples that are shuffled on a rank."""
        return self.trained_local // self.unit

    @property
    def coupled(self) -> int:
        """Points that share a micro-batch: the points of a sample, or the members of a group at the same noise."""
        return {"point": 1, "sample": self.points_per_sample, "group": self.group_members}[self.together]

    @property
    def points_per_update(self) -> int:
        """Training points behind one optimiser step on one rank."""
        return self.trained_local // self.batch.updates * self.points_per_sample

    @property
    def accumulate(self) -> int:
        """Micro-batches of one optimiser step."""
        return self.points_per_update // self.batch.micro

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return self.batch.updates * self.batch.passes

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of an epoch, which is the length of the loader."""
        return self.accumulate * self.steps_per_epoch

    def local_samples(self, rank: int) -> list[int]:
        """Global numbers of the samples of one rank: dealt round-robin, one by one or in whole groups."""
        starts = range(rank * self.block, self.samples, self.world_size * self.block)
        return [start + i for start in starts for i in range(self.block)]

    def in_order(self, gathered: Tensor) -> Tensor:
        """What every rank has of its samples, (ranks, samples_local, …), by global sample: (samples, …)."""
        return gathered.unflatten(1, (-1, self.block)).transpose(0, 1).flatten(0, 2)

    def table(self) -> dict[str, str]:
        """The plan in words, for the table at the start of a run."""
        b = self.batch
        return {
            "samples per epoch": f"{b.prompts} prompts × {b.group_size} = {self.samples}",
            "on each rank": f"{self.samples_local} of {self.world_size} rank(s)",
            "training points": f"{self.trained_local} × {self.points_per_sample} steps = "
            f"{self.trained_local * self.points_per_sample}",
            "optimiser steps per epoch": f"{b.updates} updates × {b.passes} pass(es) = {self.steps_per_epoch}",
            "one optimiser step": f"{self.accumulate} micro-batches × {b.micro} points",
        }
