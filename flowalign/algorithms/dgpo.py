"""Direct group preference optimisation, DGPO (arXiv:2510.08425): DPO for whole groups, weighted by advantage."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.compared import compared
from flowalign.algorithms.errors import matching
from flowalign.types import Point


class DGPO(Algorithm):
    """sigmoid(S) A d with d the matching error and S the mean over the group of beta A (d - d_ref), without gradient.

    The weight sigmoid(S) is small if the policy already prefers the better samples of the group. A row has no gradient
    once its ratio exp(d_old - d) has left 1 ± clip in the direction of its advantage. The members of a group share
    noise and noise levels.
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    samples_with: ClassVar[str | None] = "old"
    consults: ClassVar[tuple[str, ...]] = ("old", "reference")
    together: ClassVar[Literal["point", "sample", "group"]] = "group"
    shared_noise: ClassVar[bool] = True

    def __init__(self, beta: float = 100.0, clip: float = 1e-4, adv_clip: float = 5.0, kl_beta: float = 0.0) -> None:
        super().__init__(kl_beta, adv_clip)
        if min(beta, clip) <= 0:
            raise ValueError(f"beta and clip must be positive (got beta={beta}, clip={clip}).")
        self.beta = beta
        self.clip = clip

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point. The micro-batch holds whole groups."""
        group, A = compared(p), self.clipped(p.advantage)
        d, d_ref, d_old = (matching(p, u) for u in (v, p.frozen["reference"], p.frozen["old"]))
        weight = torch.where(group.valid, group.mean(self.beta * A * (d.detach() - d_ref)), 0).sigmoid()
        drift = (d_old - d.detach()).exp() - 1
        outside = torch.where(A > 0, drift > self.clip, drift < -self.clip)
        loss = weight * A * torch.where(outside, d.detach(), d)
        metrics = {"group_weight": weight, "clip_fraction": outside.to(d.dtype), "matching": d, "advantage": A}
        return self.penalised(p, v, loss, metrics)
