"""Flow-SDE, the dynamics of Flow-GRPO (arXiv:2505.05470)."""

import math

import torch
from torch import Tensor

from flowalign.dynamics.base import Dynamics
from flowalign.flow import at_least_float32, expand


class FlowSDE(Dynamics):
    """A stochastic differential equation with the marginals of the flow and noise rate eta sqrt(sigma / (1 - sigma)).

    Published eta: 0.7 for SD3.5 with 10 steps, 0.9 for FLUX with 6.
    """

    def __init__(self, eta: float = 0.7) -> None:
        if not (0 <= eta < math.inf):
            raise ValueError(f"FlowSDE needs a finite eta ≥ 0, usually 0.3 to 1.2 (got {eta}).")
        self.eta = eta
        self.stochastic = eta > 0

    def moments(
        self,
        x: Tensor,
        v: Tensor,
        sigma: float | Tensor,
        sigma_next: float | Tensor,
        sigma_max: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of one Euler-Maruyama step.

        sigma_max, the second entry of the schedule, stands in for sigma = 1 in the noise rate, which is infinite there.
        It may be left out where sigma < 1; that is then checked, which makes a GPU wait.
        """
        x, v = at_least_float32(x), at_least_float32(v)
        s = expand(sigma, x)
        dt = expand(sigma_next, x) - s
        # Only inside this square root is sigma = 1 replaced; the drift below uses s itself.
        rate = self.eta * torch.sqrt(s / (1 - _below_one(s, sigma_max, x)))
        mean = x * (1 + rate**2 / (2 * s) * dt) + v * (1 + rate**2 * (1 - s) / (2 * s)) * dt
        return mean, rate * torch.sqrt(-dt)


def _below_one(s: Tensor, sigma_max: float | Tensor | None, x: Tensor) -> Tensor:
    if sigma_max is not None:
        return torch.where(s == 1, expand(sigma_max, x), s)
    if bool((s == 1).any()):
        raise ValueError(
            "Flow-SDE's noise rate is infinite at sigma = 1; pass sigma_max, the second entry of the schedule."
        )
    return s
