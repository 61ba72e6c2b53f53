"""Coefficients-preserving sampling (Flow-CPS, arXiv:2509.05952)."""

import math

import torch
from torch import Tensor

from flowalign.dynamics.base import Dynamics
from flowalign.flow import eps_from, mean_dims, x0_from


class CPS(Dynamics):
    """Replaces part of the predicted noise with fresh noise, keeping the total amount of noise at sigma_next exact.

    eta = 0 keeps all of the predicted noise (the ODE), eta = 1 none. Between 1 and 2 the amount of fresh noise falls
    again: eta and 2 - eta are the same dynamics. Published eta: 0.7 and 0.8; 1.2 to 1.8 for Qwen-Image.
    """

    still_at_end = True

    def __init__(self, eta: float = 0.7) -> None:
        if not 0 <= eta < 2:
            raise ValueError(
                f"CPS needs eta in [0, 2) (got {eta}): the share of fresh noise is sin(eta π/2), largest at eta=1."
            )
        self.eta = eta
        self.stochastic = eta > 0

    def _moments(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, s_max: Tensor | None) -> tuple[Tensor, Tensor]:
        del s_max  # nothing diverges at sigma = 1
        c = s_next * math.sin(self.eta * math.pi / 2)
        mean = (1 - s_next) * x0_from(x, v, s) + torch.sqrt(s_next**2 - c**2) * eps_from(x, v, s)
        return mean, c

    def log_prob(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """-|y - mean|^2, mean over dims, (B,). The method drops scale and constants, hence its own clip ranges."""
        del std
        return mean_dims(-((y.detach() - mean) ** 2))

    def kl(
        self, mean: Tensor, mean_ref: Tensor, std: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
    ) -> Tensor:
        """|mean - mean_ref|^2, mean over dims, (B,), also without a denominator."""
        del std, sigma, sigma_next
        return mean_dims((mean - mean_ref) ** 2)
