"""The deterministic walk."""

import torch
from torch import Tensor

from flowalign.dynamics.base import Dynamics
from flowalign.flow import at_least_float32, expand


class ODE(Dynamics):
    """Euler step of dx/dsigma = v: no noise, hence no density."""

    stochastic = False

    def moments(
        self,
        x: Tensor,
        v: Tensor,
        sigma: float | Tensor,
        sigma_next: float | Tensor,
        sigma_max: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x + dt v, and zero."""
        del sigma_max
        x, v = at_least_float32(x), at_least_float32(v)
        dt = expand(sigma_next, x) - expand(sigma, x)
        return x + dt * v, torch.zeros_like(dt)

    def log_prob(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Refused: a deterministic step has no density."""
        raise TypeError("steps of the ODE are deterministic and have no density; use FlowSDE or CPS, or algo=nft.")
