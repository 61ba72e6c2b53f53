"""Learning-rate schedules, as functions of the optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch.optim.lr_scheduler import LambdaLR

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Learning-rate factor: linear warm-up over `warmup` steps, then constant or decaying to `floor`."""

    kind: Kind = "constant"
    warmup: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"a schedule is {', '.join(get_args(Kind))} (got {self.kind!r}).")
        if self.warmup < 0 or not 0 <= self.floor <= 1:
            raise ValueError(
                f"a schedule warms up for 0 steps or more and falls to a share of the rate in [0, 1] (got warmup="
                f"{self.warmup}, floor={self.floor})."
            )

    def __call__(self, step: int, total: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        done = min((step - self.warmup) / max(total - self.warmup, 1), 1.0)
        left = 1 - done if self.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.floor + (1 - self.floor) * left


def set_rates(scheduler: LambdaLR) -> None:
    """Set the optimiser's rates to those of the schedule at its present step.

    The rates of a checkpoint are those of the schedule that it was written under: 0, where that run was to end.
    """
    groups = scheduler.optimizer.param_groups
    for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = rate * factor(scheduler.last_epoch)
