"""A sampling step as a Gaussian: its mean and standard deviation, and the log-density of a given step."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flowalign.flow import at_least_float32, expand, mean_dims

LOG_SQRT_2PI = torch.tensor(0.5 * math.log(2 * math.pi), dtype=torch.float32).item()
"""Rounded to float32 even for float64 latents, as in Flow-GRPO's code, so that log-densities agree with it exactly."""


class Step(NamedTuple):
    """One step: the next state (B, …) and the Gaussian it was drawn from, mean (B, …) and std (B, 1, …)."""

    x_next: Tensor
    mean: Tensor
    std: Tensor


class Dynamics(ABC):
    """A stateless rule for stepping from sigma to sigma_next < sigma. Subclasses implement `_moments`."""

    stochastic: bool = True
    """Whether a step has a density, which policy-gradient algorithms need."""
    still_at_end: ClassVar[bool] = False
    """Whether the step to sigma = 0 adds no noise and so has no density."""

    @abstractmethod
    def _moments(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, s_max: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean (B, …) and std (B, 1, …). x, v are float32 or better; the sigmas (B, 1, …) have their precision."""

    def moments(
        self,
        x: Tensor,
        v: Tensor,
        sigma: float | Tensor,
        sigma_next: float | Tensor,
        sigma_max: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, …) and true standard deviation (B, 1, …) of the next state, in float32 or better.

        x and v are (B, …); each sigma is a float, 0-d or (B,). sigma_max is the second entry of the schedule.
        """
        x, v = at_least_float32(x), at_least_float32(v)
        s_max = None if sigma_max is None else expand(sigma_max, x)
        return self._moments(x, v, expand(sigma, x), expand(sigma_next, x), s_max)

    def step(
        self,
        x: Tensor,
        v: Tensor,
        sigma: float | Tensor,
        sigma_next: float | Tensor,
        sigma_max: float | Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Step:
        """Take one step with the given standard normal noise (B, …), or with fresh noise if it is None."""
        mean, std = self.moments(x, v, sigma, sigma_next, sigma_max)
        if not self.stochastic:
            return Step(mean, mean, std)
        noise = torch.randn_like(mean) if noise is None else noise
        return Step(mean + std * noise, mean, std)

    def log_prob(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Gaussian log-density of the step to y, averaged over dims: (B,). No gradient flows through y."""
        # A mean, not a sum: the published clip ranges of 1e-4 and below refer to it.
        return mean_dims(-((y.detach() - mean) ** 2) / (2 * std**2) - std.log() - LOG_SQRT_2PI)

    def kl(
        self, mean: Tensor, mean_ref: Tensor, std: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
    ) -> Tensor:
        """The published penalty on the means, (B,). Its denominator uses the noise rate std / sqrt(-dt), not std."""
        minus_dt = expand(sigma, mean) - expand(sigma_next, mean)
        return mean_dims((mean - mean_ref) ** 2 * minus_dt / (2 * std**2))

    def gaussian_kl(self, mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
        """KL divergence between two steps of equal std, mean over dims, (B,)."""
        return mean_dims((mean - mean_ref) ** 2 / (2 * std**2))
