"""Every step stochastic (Flow-GRPO)."""

from flowalign.steps.base import StepPlan, Steps, check_share, leading


class All(Steps):
    """Noise on every step; all but the last are trained, since the last one says nearly nothing about the image."""

    def __init__(self, trained: float = 0.99) -> None:
        self.trained = check_share(trained)

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """The same plan every epoch."""
        del epoch
        return StepPlan(noisy=(True,) * num_steps, trained=tuple(range(leading(num_steps, self.trained))))
