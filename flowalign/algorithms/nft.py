"""DiffusionNFT (arXiv:2509.16117): a contrast of two regressions on re-noised samples; no density, any sampler."""

from typing import ClassVar, Literal, get_args

from torch import Tensor

from flowalign.algorithms.base import Algorithm, optimality
from flowalign.algorithms.errors import adaptive, x0_error
from flowalign.flow import at_least_float32, mean_dims
from flowalign.types import Point

Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


class NFT(Algorithm):
    """(r l+ + (1 - r) l-) / beta: a good sample (r = 1) pulls the live policy to itself, a bad one (r = 0) repels it.

    adv_clip bounds the advantage, which makes r 0 or 1 at the bound (or at adv_range, if given), and multiplies the
    loss, as in the method's code. adv_mode keeps a part of the credit only: its positive side, its sign, …
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
            raise ValueError(f"beta is the reach of the implicit policies and must be positive (got {beta}).")
        if adv_mode not in get_args(Mode):
            raise ValueError(f"adv_mode is one of {', '.join(get_args(Mode))} (got {adv_mode!r}).")
        if adv_range is not None and adv_range <= 0:
            raise ValueError(f"adv_range, the |advantage| that makes r 0 or 1, must be positive (got {adv_range}).")
        self.beta = beta
        self.adv_mode: Mode = adv_mode
        self.adv_range = adv_clip if adv_range is None else adv_range

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; p is a noised point."""
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
        """Probability r in [0, 1] that the sample is a good one, (B,); an advantage of 0 is a half."""
        return optimality(_part(self.clipped(advantage), self.adv_mode), self.adv_range)


def _part(A: Tensor, mode: Mode) -> Tensor:
    if mode == "positive_only":
        return A.clamp(min=0)
    if mode == "negative_only":
        return A.clamp(max=0)
    if mode == "one_only":
        return (A > 0).to(A.dtype)
    if mode == "binary":
        return A.sign()
    return A
