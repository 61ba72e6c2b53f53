"""The batch plan: the user's settings (prompts, group size, micro-batch, updates) and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The size of an epoch. `micro` is the number of training points (sample × step) per forward and backward pass.

    A smaller update is one micro-batch, so a plan for one device also fits several. micro="auto" leaves it open until
    the device is known; see Geometry.with_micro.
    """

    prompts: int
    group_size: int
    micro: int | Literal["auto"]
    updates: int = 1
    passes: int = 1
    extremes: int | None = None
    """Largest number of images of each group to train on, half of them the best and half the worst; None: all."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"batch.group_size={self.group_size} gives every advantage 0, so nothing can be learnt: use at "
                "least 2 (8 to 24 are usual)."
            )
        if self.extremes is not None and self.extremes < 2:
            raise ValueError(
                f"batch.extremes={self.extremes} leaves no pair of a best and a worst image: use at least 2, or null "
                "for all."
            )
        for name in ("prompts", "micro", "updates", "passes"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"batch.{name} must be at least 1 (got {getattr(self, name)}).")

    @property
    def members(self) -> int | None:
        """Images of a group that are trained on; None: all."""
        return None if self.extremes is None or self.extremes >= self.group_size else self.extremes


class PlanError(ValueError):
    """A batch plan that is not possible. `changes` are the values of `batch` that, together, give the nearest one."""

    def __init__(self, why: str, changes: dict[str, int]) -> None:
        settings = [f"batch.{name}={value}" for name, value in changes.items()]
        super().__init__(f"{why}: use {' and '.join(settings)}{' together' if len(settings) > 1 else ''}.")
        self.changes = changes


Misfit = tuple[str, str, int]
"""The reason why a plan is not possible, the field of `batch` at fault, and its nearest possible value."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def nearest_divisor(number: int, wanted: float) -> int:
    """The divisor of `number` closest to `wanted`; of two, the larger."""
    return nearest_of(divisors(number), wanted)


def nearest_of(numbers: Iterable[int], wanted: float) -> int:
    """The number closest to `wanted`; of two, the larger."""
    return min(numbers, key=lambda n: (abs(n - wanted), -n))


@dataclass(frozen=True)
class Geometry:
    """The batch plan of one rank, fixed for the run. Raises PlanError if the settings allow none.

    together: the rows that share a micro-batch (Algorithm.together). members: samples of each group that are trained
    on, None for all. whole: all samples of a group go to the same rank, as they also do if the loss couples groups or
    if `members` is set. trunk: the group size is a multiple of it (StepPlan.trunk). least: smallest number
    of points of a micro-batch (Algorithm.least_micro).
    """

    batch: Batch
    points_per_sample: int
    world_size: int = 1
    together: Literal["point", "sample", "group"] = "point"
    members: int | None = None
    whole: bool = False
    trunk: int = 1
    least: int = 1

    def __post_init__(self) -> None:
        for check in (self._check_group, self._check_ranks, self._check_updates, self._check_micro):
            if (misfit := check()) is not None:
                why, name, value = misfit
                raise PlanError(why, {name: value} | self._further_changes(name, value))

    def _further_changes(self, name: str, value: int) -> dict[str, int]:
        """The other changes needed after this one. Ends, since each failing check comes later than the one before."""
        try:
            replace(self, batch=replace(self.batch, **{name: value}))
        except PlanError as error:
            return error.changes
        return {}

    def _check_group(self) -> Misfit | None:
        size, least = self.batch.group_size, max(self.members or 2, 2)
        if size >= least and size % self.trunk == 0:
            return None
        fitting = (n for n in range(least, least + size + 2 * self.trunk) if n % self.trunk == 0)
        if size < least:
            why = f"{self.members} members of each group are trained on, more than batch.group_size={size}"
        else:
            why = f"batch.group_size={size} is not a whole number of trunks of {self.trunk} branches"
        return why, "group_size", nearest_of(fitting, size)

    def _check_ranks(self) -> Misfit | None:
        b = self.batch
        if self.samples // self.block % self.world_size == 0:
            return None
        blocks = b.group_size // self.block  # of a prompt
        fitting = (p for p in range(1, b.prompts + self.world_size + 1) if p * blocks % self.world_size == 0)
        dealt = f"cannot be dealt to {self.world_size} ranks{' in whole groups' if self.block > 1 else ''}"
        return f"{self._product} {dealt}", "prompts", nearest_of(fitting, b.prompts)

    def _check_updates(self) -> Misfit | None:
        updates, units = self.batch.updates, self.units_local
        if units % updates == 0:
            return None
        kind = "groups" if self.together == "group" else "samples"
        why = f"{units} {kind} on a rank cannot be cut into batch.updates={updates} equal parts"
        return why, "updates", nearest_divisor(units, updates)

    def _check_micro(self) -> Misfit | None:
        if self.micro in (fitting := self.micros()):
            return None
        if not fitting:
            why = f"an update has fewer training points than the {self.least} that are compared with each other"
            return why, *(("updates", 1) if self.batch.updates > 1 else ("prompts", 2 * self.batch.prompts))
        if self.micro < self.least:
            why = f"batch.micro={self.micro} leaves a training point none to be compared with, so nothing can be learnt"
            return why, "micro", nearest_of(fitting, self.micro)
        rows = f" of whole {self.together}s of {self.coupled} points" if self.coupled > 1 else ""
        why = f"{self.points_per_update} training points of an update cannot be cut into batch.micro={self.micro}{rows}"
        return why, "micro", nearest_of(fitting, self.micro)

    def micros(self) -> list[int]:
        """The possible values of `batch.micro`, ascending: they divide an update and keep coupled rows together."""
        every = (self.coupled * count for count in divisors(self.points_per_update // self.coupled))
        return [micro for micro in every if micro >= self.least]

    @property
    def micro(self) -> int:
        """Points per micro-batch, at most a whole update; the smallest possible number while it is open."""
        if self.batch.micro == "auto":
            return min(self.micros(), default=self.coupled)
        return min(self.batch.micro, self.points_per_update)

    def with_micro(self, micro: int | None) -> Geometry:
        """The plan with this micro-batch if it is open and the value is possible; else unchanged."""
        if self.batch.micro != "auto" or micro not in self.micros():
            return self
        return replace(self, batch=replace(self.batch, micro=micro))

    @property
    def _product(self) -> str:
        return f"{self.batch.prompts} prompts × {self.batch.group_size} = {self.samples} samples"

    @property
    def block(self) -> int:
        """Number of neighbouring samples that go to the same rank."""
        whole = self.whole or self.together == "group" or self.members is not None
        return self.batch.group_size if whole else 1

    @property
    def samples(self) -> int:
        """Samples per epoch, on all ranks together."""
        return self.batch.prompts * self.batch.group_size

    @property
    def samples_local(self) -> int:
        """Samples that one rank generates per epoch."""
        return self.samples // self.world_size

    @property
    def group_members(self) -> int:
        """Samples per group that are trained on."""
        return self.batch.group_size if self.members is None else self.members

    @property
    def trained_local(self) -> int:
        """Samples that one rank trains on per epoch."""
        return self.samples_local * self.group_members // self.batch.group_size

    @property
    def unit(self) -> int:
        """Number of neighbouring samples in the same update: one, or a group."""
        return self.group_members if self.together == "group" else 1

    @property
    def units_local(self) -> int:
        """Units (samples or groups) that are shuffled on one rank."""
        return self.trained_local // self.unit

    @property
    def coupled(self) -> int:
        """Number of points that must share a micro-batch: those of a sample, or of a group at the same noise level."""
        return {"point": 1, "sample": self.points_per_sample, "group": self.group_members}[self.together]

    @property
    def points_per_update(self) -> int:
        """Training points per optimiser step on one rank."""
        return self.trained_local // self.batch.updates * self.points_per_sample

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimiser step."""
        return self.points_per_update // self.micro

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch."""
        return self.batch.updates * self.batch.passes

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches per epoch: the length of the loader."""
        return self.accumulate * self.steps_per_epoch

    def local_samples(self, rank: int) -> list[int]:
        """Global numbers of one rank's samples, which are dealt round-robin, one by one or in whole groups."""
        starts = range(rank * self.block, self.samples, self.world_size * self.block)
        return [start + i for start in starts for i in range(self.block)]

    def in_order(self, gathered: Tensor) -> Tensor:
        """Values gathered from all ranks, (ranks, samples_local, …), in global sample order: (samples, …)."""
        return gathered.unflatten(1, (-1, self.block)).transpose(0, 1).flatten(0, 2)

    def table(self) -> dict[str, str]:
        """The rows of the table that is printed at the start of a run."""
        b, accumulated = self.batch, "1 micro-batch" if self.accumulate == 1 else f"{self.accumulate} micro-batches"
        return {
            "samples per epoch": f"{b.prompts} prompts × {b.group_size} = {self.samples}",
            "on each rank": f"{self.samples_local} of {self.world_size} rank(s)",
            "training points": f"{self.trained_local} × {self.points_per_sample} steps = "
            f"{self.trained_local * self.points_per_sample}",
            "optimiser steps per epoch": f"{b.updates} updates × {b.passes} pass(es) = {self.steps_per_epoch}",
            "one optimiser step": f"{accumulated} × {self.micro} points",
        }
