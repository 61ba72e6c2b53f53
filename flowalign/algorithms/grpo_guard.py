"""GRPO-Guard (arXiv:2510.22319): ratios centred at 1 with equal scale at every step, gradients balanced over steps."""

from typing import ClassVar, Literal

from torch import Tensor

from flowalign.algorithms.base import over_rows
from flowalign.algorithms.grpo import GRPO
from flowalign.dynamics import Dynamics
from flowalign.types import Point, required


class GRPOGuard(GRPO):
    """GRPO with log ρ' = S (log ρ + |μ - μ_old|^2 / 2 S^2) and the policy term divided by -dt.

    For a step x' = μ_old + S z, log ρ' is the mean over dims of z (μ - μ_old). Its expectation is 0, whereas that of
    log ρ is negative, and its scale does not depend on the noise S of the step. Hence other clip ranges, such as 2e-6.
    """

    keeps_mean: ClassVar[bool] = True
    dynamics_only: ClassVar[tuple[str, ...]] = ("FlowSDE",)

    def __init__(
        self,
        dynamics: Dynamics,
        clip: float = 2e-6,
        adv_clip: float = 5.0,
        kl_beta: float = 0.0,
        kl: Literal["x", "gaussian", "v"] = "x",
        parity: bool = False,
    ) -> None:
        """parity: use one shift for all rows, the mean over the micro-batch, as in the authors' code."""
        super().__init__(dynamics, clip, adv_clip, kl_beta, kl)
        self.parity = parity

    @property
    def silent_at_zero(self) -> bool:
        """As in GRPO, but False with parity, where rows share a shift."""
        return super().silent_at_zero and not self.parity

    @property
    def micro_matters(self) -> bool:
        """True with parity, where the shift is a mean over the micro-batch."""
        return self.parity

    def log_ratio(self, p: Point, mean: Tensor, std: Tensor) -> Tensor:
        """log ρ', (B,)."""
        shift = self.dynamics.gaussian_kl(mean, required(p.mean, "mean"), std)
        log_ratio = super().log_ratio(p, mean, std) + (over_rows(p, shift) if self.parity else shift)
        return log_ratio * std.flatten()

    def weight(self, p: Point, std: Tensor) -> Tensor:
        """1 / -dt, (B,): removes the step size from the gradient, which would otherwise favour long steps."""
        del std
        return 1 / (p.sigma - required(p.sigma_next, "sigma_next"))
