"""PRFL (HY-Video-PRFL): the gradient of a reward on noisy latents through one step, combined with flow matching."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.errors import matching
from flowalign.flow import at_least_float32, expand
from flowalign.types import Point, required


class PRFL(Algorithm):
    """scale · max(margin - r(x', σ'), 0), where x' is one step of the flow from x at σ to the next lower level σ'.

    The reward r judges the noisy latent itself, so its gradient needs neither further steps nor decoding. With
    sft_weight > 0 every other point is a given image of the prompt, whose loss is flow matching.
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    follows_reward: ClassVar[bool] = True

    def __init__(self, scale: float = 0.1, margin: float = 2.0, sft_weight: float = 1.0, kl_beta: float = 0.0) -> None:
        super().__init__(kl_beta)
        if scale <= 0 or sft_weight < 0:
            raise ValueError(
                "scale weighs the reward and must be positive; sft_weight must be ≥ 0, where 0 disables flow matching "
                f"(got {scale} and {sft_weight})."
            )
        self.scale, self.margin, self.sft_weight = scale, margin, sft_weight
        self.source = "both" if sft_weight > 0 else "rollout"

    def lands(self, p: Point, v: Tensor) -> tuple[Tensor, Tensor]:
        """The Euler step to the next lower level: states (B, …) and noise levels (B,)."""
        sigma_next = required(p.sigma_next, "sigma_next")
        x = at_least_float32(p.x)
        return x + (expand(sigma_next, x) - expand(p.sigma, x)) * v, sigma_next

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point that carries the reward of the state that `lands` returns."""
        reward = required(p.reward, "reward")
        real = torch.zeros_like(reward, dtype=torch.bool) if p.real is None else p.real
        error = matching(p, v).to(reward)
        loss = torch.where(real, self.sft_weight * error, self.scale * (self.margin - reward).clamp(min=0))
        metrics = {"landing": _mean_filled(reward, ~real), "matching": _mean_filled(error, real)}
        return self.penalised(p, v, loss, {name: m for name, m in metrics.items() if m is not None})


def _mean_filled(value: Tensor, rows: Tensor) -> Tensor | None:
    """value (B,) with all rows outside `rows` set to the mean over `rows`, which keeps that mean; None without any."""
    return torch.where(rows, value, value[rows].mean()) if rows.any() else None
