"""Which steps of an epoch's walks are stochastic and which are trained on."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepPlan:
    """One epoch's choice for a schedule of T steps."""

    noisy: tuple[bool, ...]
    """T flags: the step is drawn from the dynamics; the others follow the solver."""
    trained: tuple[int, ...]
    """Indices of the steps that become training points, ascending."""


class Steps(Protocol):
    """A pure function of the epoch, so that a resumed run plans what the uninterrupted one would have planned."""

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """The plan of this epoch for a schedule of num_steps steps."""
        ...


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
