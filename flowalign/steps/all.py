"""Every step stochastic (Flow-GRPO)."""

from flowalign.steps.base import StepPlan, Steps, check_share, leading


class All(Steps):
    """Noise on every step; all but the last are trained on, since the last says almost nothing about the image.

    noisy < 1 leaves the last steps to the solver: noise added there stays in the image, where the reward sees it.
    """

    def __init__(self, trained: float = 0.99, noisy: float = 1.0) -> None:
        self.trained, self.noisy = check_share(trained), check_share(noisy, "noisy")
        if trained > noisy:
            raise ValueError(
                f"only noisy steps can be trained on, so trained={trained} cannot exceed noisy={noisy}: use "
                f"steps.trained={noisy}, or a larger steps.noisy."
            )

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """Return the same plan in every epoch."""
        del epoch
        noisy = leading(num_steps, self.noisy)
        return StepPlan(
            noisy=tuple(i < noisy for i in range(num_steps)), trained=tuple(range(leading(num_steps, self.trained)))
        )
