"""A few stochastic steps at random positions (Flow-Factory's random SDE steps)."""

from flowalign.steps.base import StepPlan, Steps, check_share, drawn, leading


class Random(Steps):
    """`num` of the leading steps, drawn every epoch, are stochastic and trained on; the others follow the solver."""

    def __init__(self, num: int, seed: int, trained: float = 0.99) -> None:
        if num < 1:
            raise ValueError(f"at least one step must be trained on (got num={num}).")
        self.num = num
        self.seed = seed
        self.trained = check_share(trained)

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """Return a subset that depends on (seed, epoch) only, hence is the same in every process."""
        chosen = drawn(self.num, leading(num_steps, self.trained), self.seed, epoch)
        return StepPlan(noisy=tuple(i in chosen for i in range(num_steps)), trained=chosen)
