"""Which steps of an epoch's walks are stochastic and which are trained on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from flowalign.keyed import CHOICE, keyed_generator
from flowalign.solvers import DPM, Solver


@dataclass(frozen=True)
class StepPlan:
    """One epoch's choice for a schedule of T steps."""

    noisy: tuple[bool, ...]
    """T flags: the step is drawn from the dynamics; the others follow the solver."""
    trained: tuple[int, ...]
    """Indices of the steps that become training points, ascending."""
    branches: int = 0
    """Above 0, every sample is stochastic at one trained step of its own: so many neighbours share it, then the next
    ones take the next step (TempFlow-GRPO)."""
    tail: float | None = None
    """Share of the steps after the last stochastic one that is kept, re-spaced and solved by `tail_solver`; None: all
    of them, as they are (MixGRPO-Flash)."""
    tail_solver: Solver = DPM()
    """It remembers every step before the tail too."""

    @property
    def points(self) -> int:
        """Training points of one sample."""
        return min(1, len(self.trained)) if self.branches else len(self.trained)

    @property
    def trunk(self) -> int:
        """How many neighbouring samples branch off one deterministic walk; 1 without branches."""
        return self.branches * len(self.trained) or 1

    @property
    def last_noisy(self) -> int:
        """The last stochastic step; -1 if there is none."""
        return max((i for i, noisy in enumerate(self.noisy) if noisy), default=-1)

    def own_step(self, sample: int) -> int:
        """The one stochastic step of a sample of a plan with branches; groups are whole numbers of trunks."""
        return self.trained[sample // self.branches % len(self.trained)]

    def rows(self, step: int, samples: Sequence[int]) -> list[int]:
        """Positions among `samples` of those for whom this step is stochastic."""
        if not self.noisy[step]:
            return []
        return [row for row, s in enumerate(samples) if not self.branches or self.own_step(s) == step]


class Steps(ABC):
    """A pure function of the epoch, so that a resumed run plans what the uninterrupted one would have planned."""

    replayed: ClassVar[bool] = False
    """Whether the choice makes sense only for an algorithm that replays the steps which it chooses."""

    @abstractmethod
    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """The plan of this epoch for a schedule of num_steps steps. Its number of points is the same in every epoch."""


def window(start: int, stop: int, num_steps: int) -> StepPlan:
    """Steps start .. stop-1 are stochastic and trained."""
    chosen = tuple(range(start, stop))
    return StepPlan(noisy=tuple(i in chosen for i in range(num_steps)), trained=chosen)


def check_share(trained: float) -> float:
    """The share of the schedule that may be trained on, refused outside (0, 1]."""
    if not 0 < trained <= 1:
        raise ValueError(
            f"the trained share of the steps lies in (0, 1]; 0.99 leaves out the last one (got {trained})."
        )
    return trained


def leading(num_steps: int, trained: float) -> int:
    """How many steps, counted from the noisy side, may be trained on."""
    count = int(num_steps * trained)
    if count == 0:
        raise ValueError(
            f"trained={trained} of {num_steps} step(s) leaves none to train on; use more steps or trained=1."
        )
    return count


def drawn(num: int, count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """`num` of the first `count` steps, ascending: a subset that depends on (seed, epoch) alone."""
    if num > count:
        raise ValueError(f"cannot choose {num} of {count} steps to train on; use num ≤ {count} or more steps.")
    order = torch.randperm(count, generator=keyed_generator(seed, epoch, 0, CHOICE))
    return tuple(sorted(order[:num].tolist()))
