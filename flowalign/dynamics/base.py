"""One step of the walk as a Gaussian: what its mean and standard deviation are, and how probable a given step was."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from flowalign.flow import at_least_float32, expand, mean_dims

LOG_SQRT_2PI = torch.tensor(0.5 * math.log(2 * math.pi), dtype=torch.float32).item()
"""Rounded to float32 for float64 latents too, as in Flow-GRPO's code, so that log-densities of both agree exactly."""


class Step(NamedTuple):
    """One step: where it went, (B, …), and the Gaussian it was drawn from, mean (B, …) and std (B, 1, …)."""

    x_next: Tensor
    mean: Tensor
    std: Tensor


class Dynamics(ABC):
    """A stateless rule for going from sigma to sigma_next < sigma. A subclass writes `_moments`."""

    stochastic: bool = True
    """Whether a step has a density, which policy-gradient algorithms need."""
    still_at_end: ClassVar[bool] = False
    """Whether the step to sigma = 0 adds no noise, so that it has none."""

    @abstractmethod
    def _moments(self, x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, s_max: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean (B, …) and std (B, 1, …), from x, v in float32 or better and sigmas (B, 1, …) of their precision."""

    def moments(
        self,
        x: Tensor,
        v: Tensor,
        sigma: float | Tensor,
        sigma_next: float | Tensor,
        sigma_max: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, …) and true standard deviation (B, 1, …) of the next state, in float32 or better.

        x and v are (B, …); the sigmas floats, 0-d or (B,). sigma_max is the second entry of the schedule.
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
        """Take one step with the given standard normal noise (B, …), or with fresh noise where none is given."""
        mean, std = self.moments(x, v, sigma, sigma_next, sigma_max)
        if not self.stochastic:
            return Step(mean, mean, std)
        noise = torch.randn_like(mean) if noise is None else noise
        return Step(mean + std * noise, mean, std)

    def log_prob(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Gaussian log-density of the step to y, averaged over dims: (B,). No gradient flows through y."""
        # A mean, not a sum, is what the published clip ranges of 1e-4 and below refer to.
        return mean_dims(-((y.detach() - mean) ** 2) / (2 * std**2) - std.log() - LOG_SQRT_2PI)

    def kl(
        self, mean: Tensor, mean_ref: Tensor, std: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
    ) -> Tensor:
        """The published penalty on the means, (B,): its denominator holds the noise rate std / sqrt(-dt), not std."""
        minus_dt = expand(sigma, mean) - expand(sigma_next, mean)
        return mean_dims((mean - mean_ref) ** 2 * minus_dt / (2 * std**2))

    def gaussian_kl(self, mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
        """KL divergence between the two steps, per dim: (B,)."""
        return mean_dims((mean - mean_ref) ** 2 / (2 * std**2))
