"""Branches off a deterministic trunk, each with noise at a single step (TempFlow-GRPO)."""

from flowalign.steps.base import StepPlan, Steps, check_share, drawn, leading


class Branch(Steps):
    """At each chosen step, `branches` samples leave the ODE by one stochastic step and then follow the ODE again.

    Images of the same step then differ by that step alone, and are compared only with each other. The published choice
    is every step but the last (`num` unset) with 6 branches each; `num` draws that many steps anew every epoch.
    """

    replayed = True

    def __init__(self, branches: int, seed: int, num: int | None = None, trained: float = 0.99) -> None:
        if branches < 2:
            raise ValueError(
                f"a branch is compared with the others of its step, so branches must be at least 2 (got {branches})."
            )
        if num is not None and num < 1:
            raise ValueError(f"at least one step must have branches (got num={num}).")
        self.branches = branches
        self.seed = seed
        self.num = num
        self.trained = check_share(trained)

    def __call__(self, epoch: int, num_steps: int) -> StepPlan:
        """Return a plan with branches · num samples per trunk."""
        count = leading(num_steps, self.trained)
        chosen = drawn(count if self.num is None else self.num, count, self.seed, epoch)
        return StepPlan(tuple(i in chosen for i in range(num_steps)), trained=chosen, branches=self.branches)
