"""DiffusionNFT (arXiv:2509.16117): two contrastive regressions on re-noised samples; no density, any sampler."""

from typing import ClassVar, Literal, get_args

from torch import Tensor

from flowalign.algorithms.base import Algorithm, optimality
from flowalign.algorithms.errors import adaptive, x0_error
from flowalign.flow import at_least_float32, mean_dims
from flowalign.types import Point

Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


class NFT(Algorithm):
    """(r l+ + (1 - r) l-) / beta: a good sample (r = 1) attracts the live policy, a bad one (r = 0) repels it.

    l+ and l- are the errors of the implicit policies beta v + (1 - beta) v_old and (1 + beta) v_old - beta v. adv_clip
    bounds the advantage and multiplies the loss, as in the authors' code. r is 0 or 1 at an advantage of ±adv_range,
    adv_clip by default. adv_mode keeps only a part of the credit: its positive side, its sign, …
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    samples_with: ClassVar[str | None] = "old"
    consults: ClassVar[tuple[str, ...]] = ("old",)

    def __init__(
        self,
        beta: float = 1.0,
        adv_clip: float = 5.0,
        kl_beta: float = 1e-4,
        adv_mode: Mode = "all",
        adv_range: float | None = None,
    ) -> None:
        super().__init__(kl_beta, adv_clip)
        if beta <= 0:
            raise ValueError(f"beta scales the step to the implicit policies and must be positive (got {beta}).")
        if adv_mode not in get_args(Mode):
            raise ValueError(f"adv_mode is one of {', '.join(get_args(Mode))} (got {adv_mode!r}).")
        if adv_range is not None and adv_range <= 0:
            raise ValueError(f"adv_range, the |advantage| at which r is 0 or 1, must be positive (got {adv_range}).")
        self.beta = beta
        self.adv_mode: Mode = adv_mode
        self.adv_range = adv_clip if adv_range is None else adv_range

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point."""
        v, v_old = at_least_float32(v), at_least_float32(p.frozen["old"])
        b, r = self.beta, self.optimality(p.advantage)
        positive = adaptive(x0_error(p, b * v + (1 - b) * v_old))
        negative = adaptive(x0_error(p, (1 + b) * v_old - b * v))
        loss = self.adv_clip * (r * positive + (1 - r) * negative) / b
        metrics = {
            "r": r,
            "loss_positive": positive,
            "loss_negative": negative,
            "v_drift": mean_dims((v - v_old) ** 2),
        }
        return self.penalised(p, v, loss, metrics)

    def optimality(self, advantage: Tensor) -> Tensor:
        """Probability r in [0, 1] that the sample is good, (B,); 1/2 at advantage 0."""
        return optimality(_select(self.clipped(advantage), self.adv_mode), self.adv_range)


def _select(A: Tensor, mode: Mode) -> Tensor:
    if mode == "positive_only":
        return A.clamp(min=0)
    if mode == "negative_only":
        return A.clamp(max=0)
    if mode == "one_only":
        return (A > 0).to(A.dtype)
    if mode == "binary":
        return A.sign()
    return A
