"""Flow-DPPO (arXiv:2606.11025): trust region on the exact divergence of a step instead of its noisy ratio."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.algorithms.grpo import GRPO
from flowalign.dynamics import Dynamics
from flowalign.types import Point, required


class FlowDPPO(GRPO):
    """-A ρ, but 0 where KL(old step, live step) ≥ threshold and ρ has moved away from 1 in the direction of A.

    The divergence is |μ - μ_old|^2 / 2 S^2, mean over dims.
    """

    keeps_mean: ClassVar[bool] = True

    def __init__(
        self,
        dynamics: Dynamics,
        threshold: float = 1e-5,
        adv_clip: float = 5.0,
        kl_beta: float = 0.0,
        kl: Literal["x", "gaussian", "v"] = "x",
    ) -> None:
        super().__init__(dynamics, math.inf, adv_clip, kl_beta, kl)
        if threshold <= 0:
            raise ValueError(f"threshold is the trusted divergence of a step and must be positive (got {threshold}).")
        self.threshold = threshold

    def surrogate(self, p: Point, A: Tensor, ratio: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The policy term, and whether the step has left the trust region, both (B,)."""
        divergence = self.dynamics.gaussian_kl(mean.detach(), required(p.mean, "mean"), std)
        outside = (divergence >= self.threshold) & (A * (ratio - 1) > 0)
        return torch.where(outside, 0.0, -A * ratio), outside
