"""A few stochastic steps, anywhere (Flow-Factory's random SDE steps)."""

import torch

from flowalign.keyed import CHOICE, keyed_generator
from flowalign.steps.base import StepPlan, check_share, leading


class Random:
    """`num` of the leading steps, drawn anew every epoch, are stochastic and trained; the others follow the solver."""

    def __init__(self, num: int, seed: int, trained: float = 0.99) -> None:
        if num < 1:
            raise ValueError(f"at least one step has to be trained (got num={num}).")
        self.num = num
        self.seed = seed
        self.trained = check_share(trained)

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """A subset that depends on (seed, epoch) alone, hence is the same in every process."""
        count = leading(num_steps, self.trained)
        if self.num > count:
            raise ValueError(f"cannot choose {self.num} of {count} steps to train on; use num ≤ {count} or more steps.")
        order = torch.randperm(count, generator=keyed_generator(self.seed, epoch, 0, CHOICE))
        chosen = tuple(sorted(order[: self.num].tolist()))
        return StepPlan(noisy=tuple(i in chosen for i in range(num_steps)), trained=chosen)
