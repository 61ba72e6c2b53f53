"""A few consecutive stochastic steps at a position drawn anew every epoch (Flow-GRPO-Fast)."""

import torch

from flowalign.keyed import CHOICE, keyed_generator
from flowalign.steps.base import StepPlan, Steps, window


class Fast(Steps):
    """`width` consecutive steps within low .. high-1 are stochastic and trained on; the others follow the solver.

    If unset, high is half of the schedule, as published, or as much as one window needs. The authors' code draws a
    position for each batch and process; here it is the same throughout an epoch.
    """

    def __init__(self, width: int, seed: int, low: int = 0, high: int | None = None) -> None:
        if width < 1 or low < 0:
            raise ValueError(f"a window has at least one step and begins at 0 or later (got width={width}, low={low}).")
        self.width = width
        self.seed = seed
        self.low = low
        self.high = high

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """Return a window whose position depends on (seed, epoch) only."""
        high = max(num_steps // 2, self.low + self.width) if self.high is None else self.high
        high = min(high, num_steps)
        if self.low + self.width > high:
            raise ValueError(
                f"there is no room for {self.width} steps in {self.low} .. {high - 1} of a schedule of {num_steps}: "
                f"use steps.width={max(high - self.low, 1)}, steps.high={self.low + self.width}, or more steps."
            )
        generator = keyed_generator(self.seed, epoch, 0, CHOICE)
        start = int(torch.randint(self.low, high - self.width + 1, (), generator=generator))
        return window(start, start + self.width, num_steps)
