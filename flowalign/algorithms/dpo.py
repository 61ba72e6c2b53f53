"""Online Diffusion-DPO (arXiv:2311.12908): of each group, the best sample against the worst."""

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowalign.algorithms.base import Algorithm
from flowalign.algorithms.compared import compared
from flowalign.algorithms.errors import matching
from flowalign.types import Point


class DPO(Algorithm):
    """-log sigmoid(-beta/2 (d_win - d_lose)) with d the matching error, live less reference.

    A pair shares noise and noise level; each of its two rows has its loss. A pair of equal advantages has no winner
    and no gradient.
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    consults: ClassVar[tuple[str, ...]] = ("reference",)
    together: ClassVar[Literal["point", "sample", "group"]] = "group"
    shared_noise: ClassVar[bool] = True
    samples_per_group: ClassVar[int | None] = 2

    def __init__(self, beta: float = 100.0, kl_beta: float = 0.0) -> None:
        """kl_beta: of a penalty beside, which the method does not have."""
        super().__init__(kl_beta)
        if beta <= 0:
            raise ValueError(f"beta is how sharply a pair is judged and must be positive (got {beta}).")
        self.beta = beta

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; p is a noised point whose micro-batch holds both of a pair."""
        pair = compared(p)
        d = matching(p, v) - matching(p, p.frozen["reference"])
        # 1 for the winner, -1 for the loser, 0 for whoever is not judged: its pair has no mean.
        side = torch.where(pair.valid, p.advantage - pair.mean(p.advantage), 0).sign()
        margin = -self.beta / 2 * pair.sum(side * d)
        metrics = {"margin": margin, "accuracy": (margin > 0).to(d.dtype), "d_win": side.clamp(min=0) * d * 2}
        return self.penalised(p, v, -logsigmoid(margin), metrics)
