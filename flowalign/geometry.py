"""The batch plan: what the user says (prompts, group size, micro-batch, updates) and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass


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


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`, the larger of two."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), -d))


@dataclass(frozen=True)
class Geometry:
    """The plan of one rank, derived once and fixed for the run."""

    batch: Batch
    points_per_sample: int
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.samples % self.world_size:
            raise ValueError(
                f"{self.batch.prompts} prompts × {self.batch.group_size} = {self.samples} samples cannot be dealt "
                f"to {self.world_size} ranks: "
                f"use batch.prompts={self._nearest_prompts()}."
            )
        if self.samples_local % self.batch.updates:
            raise ValueError(
                f"{self.samples_local} samples on a rank cannot be cut into batch.updates={self.batch.updates} "
                "equal parts: "
                f"the nearest possible number is {nearest_divisor(self.samples_local, self.batch.updates)}."
            )
        if self.points_per_update % self.batch.micro:
            raise ValueError(
                f"{self.points_per_update} training points of an update cannot be cut into "
                f"batch.micro={self.batch.micro}: "
                f"the nearest possible number is {nearest_divisor(self.points_per_update, self.batch.micro)}."
            )

    def _nearest_prompts(self) -> int:
        fits = [
            p
            for p in range(1, self.batch.prompts + self.world_size + 1)
            if p * self.batch.group_size % self.world_size == 0
        ]
        return min(fits, key=lambda p: (abs(p - self.batch.prompts), -p))

    @property
    def samples(self) -> int:
        """Samples of an epoch on all ranks together."""
        return self.batch.prompts * self.batch.group_size

    @property
    def samples_local(self) -> int:
        return self.samples // self.world_size

    @property
    def points_per_update(self) -> int:
        """Training points behind one optimiser step on one rank."""
        return self.samples_local // self.batch.updates * self.points_per_sample

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

    def local_samples(self, rank: int) -> range:
        """Global numbers of the samples of one rank: dealt round-robin, so that groups straddle ranks evenly."""
        return range(rank, self.samples, self.world_size)

    def table(self) -> dict[str, str]:
        """The plan in words, for the table at the start of a run."""
        b = self.batch
        return {
            "samples per epoch": f"{b.prompts} prompts × {b.group_size} = {self.samples}",
            "on each rank": f"{self.samples_local} of {self.world_size} rank(s)",
            "training points": f"{self.samples_local} × {self.points_per_sample} steps = "
            f"{self.samples_local * self.points_per_sample}",
            "optimiser steps per epoch": f"{b.updates} updates × {b.passes} pass(es) = {self.steps_per_epoch}",
            "one optimiser step": f"{self.accumulate} micro-batches × {b.micro} points",
        }
