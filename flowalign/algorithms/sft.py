"""Supervised fine-tuning on given images or videos: plain flow matching, the pretraining loss."""

from typing import ClassVar, Literal

from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.errors import matching
from flowalign.types import Point


class SFT(Algorithm):
    """|v - (eps - x0)|^2, mean over dims; kl_beta > 0 keeps the network close to the initial one."""

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    source: Literal["rollout", "images", "both"] = "images"

    def __init__(self, kl_beta: float = 0.0) -> None:
        super().__init__(kl_beta)

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point."""
        loss = matching(p, v)
        return self.penalised(p, v, loss, {"matching": loss})
