"""A window of stochastic steps that slides along the schedule (MixGRPO, arXiv:2507.21802)."""

import math
from dataclasses import replace
from typing import Literal, get_args

import torch

from flowalign.keyed import CHOICE, keyed_generator
from flowalign.solvers import DPM, Solver
from flowalign.steps.base import StepPlan, Steps, window

Strategy = Literal["progressive", "random", "decay", "exp_decay"]


class Window(Steps):
    """`width` consecutive steps are stochastic and trained on; the others follow the solver.

    The window starts at the noisy side, stays for `stay` epochs (MixGRPO's iterations: one rollout each) and moves by
    `stride`; the last `skip` steps are never trained on. Strategy "decay" shrinks the stay linearly from `stay` to
    `stay_min`, "exp_decay" by exp(-rate) per step beyond `threshold`; "random" draws a position every epoch. With a
    stride of `width` windows do not overlap; with a stride of 0 the window does not move (Flash*).

    Windows are always full. After the last position the window returns to the first, or with roll_back=False stays.
    parity=True reproduces the authors' code, where a window shrinks at the end of the schedule and is then empty for a
    whole stay.
    """

    replayed = True

    def __init__(
        self,
        width: int,
        seed: int,
        strategy: Strategy = "progressive",
        stay: int = 25,
        stride: int = 1,
        roll_back: bool = True,
        skip: int = 2,
        stay_min: int = 1,
        threshold: int = 13,
        rate: float = 0.1,
        tail: float | None = None,
        tail_solver: Solver | None = None,
        parity: bool = False,
    ) -> None:
        """tail: fraction of the steps after the window to keep, as in MixGRPO-Flash; None: all. tail_solver: the solver
        of these steps; None: DPM() of second order."""
        if strategy not in get_args(Strategy):
            raise ValueError(f"a window moves by {', '.join(get_args(Strategy))} (got strategy={strategy!r}).")
        for name, value, least in (("width", width, 1), ("stay", stay, 1), ("stay_min", stay_min, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least} (got {value}).")
        if stride < 0 or skip < 0:
            raise ValueError(f"stride and skip count steps and cannot be negative (got {stride}, {skip}).")
        if tail is not None and not 0 < tail <= 1:
            raise ValueError(
                f"tail is the share of steps kept after the window, in (0, 1]; 0.4 as published (got {tail})."
            )
        self.width, self.seed, self.strategy = width, seed, strategy
        self.stay, self.stride, self.roll_back, self.skip = stay, stride, roll_back, skip
        self.stay_min, self.threshold, self.rate = stay_min, threshold, rate
        self.tail, self.tail_solver, self.parity = tail, tail_solver or DPM(), parity

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """Return the window of an epoch, found by replaying the moves of all earlier epochs."""
        steps = num_steps - self.skip
        if steps < self.width:
            raise ValueError(
                f"a window of {self.width} does not fit into {num_steps} steps of which the last {self.skip} are not "
                f"trained: use steps.width={max(steps, 1)}, or rollout.num_steps={self.width + self.skip}."
            )
        start = self._random_start(epoch, steps) if self.strategy == "random" else self._start(epoch, steps)
        plan = window(start, min(start + self.width, steps), num_steps)
        return replace(plan, tail=self.tail, tail_solver=self.tail_solver)

    def _random_start(self, epoch: int, steps: int) -> int:
        generator = keyed_generator(self.seed, epoch, 0, CHOICE)
        return int(torch.randint(0, steps - self.width + 1, (), generator=generator))

    def _start(self, epochs: int, steps: int) -> int:
        end = steps if self.parity else steps - self.width
        start = stayed = 0
        for _ in range(epochs):
            stayed += 1
            if stayed >= self._stay(start, steps):
                start, stayed = start + self.stride, 0
                if start > end:
                    start = 0 if self.roll_back else end
        return start

    def _stay(self, start: int, steps: int) -> int:
        """Number of epochs at position `start`."""
        if self.strategy == "decay":
            done = start / steps
            return max(self.stay_min, int(self.stay * (1 - done) + self.stay_min * done))
        if self.strategy == "exp_decay":
            return math.ceil(self.stay * math.exp(-self.rate * max(0, start - self.threshold)))
        return self.stay
