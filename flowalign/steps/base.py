"""Which sampling steps of an epoch are stochastic and which are trained on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from flowalign.keyed import CHOICE, keyed_generator
from flowalign.solvers import DPM, Solver


@dataclass(frozen=True)
class StepPlan:
    """The choice of one epoch for a schedule of T steps."""

    noisy: tuple[bool, ...]
    """T flags: whether the step is drawn from the dynamics. The other steps follow the solver."""
    trained: tuple[int, ...]
    """Indices of the steps that become training points, ascending."""
    branches: int = 0
    """If above 0, each sample is stochastic at a single trained step. This many consecutive samples share a step, then
    the next ones take the next step (TempFlow-GRPO)."""
    tail: float | None = None
    """Fraction of the steps after the last stochastic one to keep, re-spaced and solved by `tail_solver`
    (MixGRPO-Flash); None: all of them, unchanged."""
    tail_solver: Solver = DPM()
    """Its history includes the steps before the tail."""

    @property
    def points(self) -> int:
        """Training points per sample."""
        return min(1, len(self.trained)) if self.branches else len(self.trained)

    @property
    def trunk(self) -> int:
        """Number of consecutive samples that branch off one deterministic trajectory; 1 without branches."""
        return self.branches * len(self.trained) or 1

    @property
    def last_noisy(self) -> int:
        """Index of the last stochastic step; -1 if there is none."""
        return max((i for i, noisy in enumerate(self.noisy) if noisy), default=-1)

    def own_step(self, sample: int) -> int:
        """The single stochastic step of a sample, in a plan with branches. A group consists of whole trunks."""
        return self.trained[sample // self.branches % len(self.trained)]

    def rows(self, step: int, samples: Sequence[int]) -> list[int]:
        """Positions in `samples` of the samples for which this step is stochastic."""
        if not self.noisy[step]:
            return []
        return [row for row, s in enumerate(samples) if not self.branches or self.own_step(s) == step]


class Steps(ABC):
    """A pure function from epoch to plan, so that a resumed run makes the same plans as an uninterrupted one."""

    replayed: ClassVar[bool] = False
    """Whether the choice only makes sense for an algorithm that trains on the chosen steps."""

    @abstractmethod
    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """Return the plan of an epoch for a schedule of num_steps steps. All epochs must have equally many points."""


def window(start: int, stop: int, num_steps: int) -> StepPlan:
    """Plan in which steps start .. stop-1 are stochastic and trained on."""
    chosen = tuple(range(start, stop))
    return StepPlan(noisy=tuple(i in chosen for i in range(num_steps)), trained=chosen)


def check_share(share: float, name: str = "trained") -> float:
    """Return a fraction of the schedule; ValueError if it is outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(
            f"{name} is a share of the steps and lies in (0, 1]; 0.99 leaves out the last one (got {share})."
        )
    return share


def leading(num_steps: int, trained: float) -> int:
    """Number of leading steps, from the noisy side, that may be trained on; ValueError if there are none."""
    count = int(num_steps * trained)
    if count == 0:
        raise ValueError(
            f"trained={trained} of {num_steps} step(s) leaves none to train on; use more steps or trained=1."
        )
    return count


def drawn(num: int, count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Random `num` of the first `count` steps, ascending, which depend on (seed, epoch) only."""
    if num > count:
        raise ValueError(f"cannot choose {num} of {count} steps to train on; use num ≤ {count} or more steps.")
    order = torch.randperm(count, generator=keyed_generator(seed, epoch, 0, CHOICE))
    return tuple(sorted(order[:num].tolist()))
