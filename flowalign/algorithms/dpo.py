"""Online Diffusion-DPO (arXiv:2311.12908): the best sample of each group against the worst."""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.compared import compared
from flowalign.algorithms.errors import matching
from flowalign.types import Point


class DPO(Algorithm):
    """-log sigmoid(-beta/2 (d_win - d_lose)) with d the live matching error minus that of the reference.

    The two rows of a pair share noise and noise level, and both have the loss of the pair. A pair with equal advantages
    has no winner and no gradient.
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    consults: ClassVar[tuple[str, ...]] = ("reference",)
    together: ClassVar[Literal["point", "sample", "group"]] = "group"
    shared_noise: ClassVar[bool] = True
    samples_per_group: ClassVar[int | None] = 2

    def __init__(self, beta: float = 100.0, kl_beta: float = 0.0) -> None:
        """kl_beta: weight of an additional penalty, which the method does not have."""
        super().__init__(kl_beta)
        if beta <= 0:
            raise ValueError(f"beta scales the margin of a pair and must be positive (got {beta}).")
        self.beta = beta

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point. The micro-batch holds whole pairs."""
        pair = compared(p)
        d = matching(p, v) - matching(p, p.frozen["reference"])
        # 1 for the winner, -1 for the loser, 0 for a row that does not count: its pair may have no mean.
        side = torch.where(pair.valid, p.advantage - pair.mean(p.advantage), 0).sign()
        margin = -self.beta / 2 * pair.sum(side * d)
        metrics = {"margin": margin, "accuracy": (margin > 0).to(d.dtype), "d_win": side.clamp(min=0) * d * 2}
        return self.penalised(p, v, -logsigmoid(margin), metrics)
