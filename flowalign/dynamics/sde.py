"""Stochastic differential equations with the marginals of the flow, one for each noise rate."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from flowalign.dynamics.base import Dynamics


class SDE(Dynamics):
    """Euler-Maruyama step of dx = (v + g^2/2 eps_hat / sigma) dsigma + g dw. Subclasses implement the noise rate g.

    The score of the marginal at sigma is -eps_hat / sigma with eps_hat = x + (1 - sigma) v, so the extra drift
    removes exactly as much variance as the noise adds.
    """

    def __init__(self, eta: float) -> None:
        """eta: amount of noise; 0 gives the ODE."""
        if not (0 <= eta < math.inf):
            raise ValueError(f"{type(self).__name__} needs a finite eta ≥ 0, usually 0.3 to 1.2 (got {eta}).")
        self.eta = eta
        self.stochastic = eta > 0

    @abstractmethod
    def rate(self, s: Tensor, s_max: Tensor | None) -> Tensor:
        """Noise rate g at sigma, (B, 1, …); s_max is the second entry of the schedule, if known."""

    def _moments(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, s_max: Tensor | None) -> tuple[Tensor, Tensor]:
        g, dt = self.rate(s, s_max), s_next - s
        mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
        return mean, g * torch.sqrt(-dt)
