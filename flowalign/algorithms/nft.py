"""DiffusionNFT (arXiv:2509.16117): a contrast of two regressions on re-noised samples; no density, any sampler."""

from typing import ClassVar, Literal, get_args

from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.flow import at_least_float32, mean_dims, x0_from
from flowalign.types import Point, given

Mode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


class NFT(Algorithm):
    """(r l+ + (1 - r) l-) / beta: a good sample (r = 1) pulls the live policy to itself, a bad one (r = 0) repels it.

    adv_clip bounds the advantage, which makes r 0 or 1 at the bound (or at adv_range, if given), and multiplies the
    loss, as in the method's code. adv_mode keeps a part of the credit only: its positive side, its sign, …
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    samples_with: ClassVar[str | None] = "old"

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

    @property
    def frozen(self) -> tuple[str, ...]:
        """The old policy, and the reference if it is penalised."""
        return ("old", *super().frozen)

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; p is a noised point."""
        v, v_old = at_least_float32(v), at_least_float32(p.frozen["old"])
        b, r = self.beta, self.optimality(p.advantage)
        positive = adaptive_distance(p, b * v + (1 - b) * v_old)
        negative = adaptive_distance(p, (1 + b) * v_old - b * v)
        loss = self.adv_clip * (r * positive + (1 - r) * negative) / b
        metrics = {
            "r": r,
            "loss_positive": positive,
            "loss_negative": negative,
            "v_drift": mean_dims((v - v_old) ** 2),
        }
        if self.kl_beta > 0:
            metrics["kl"] = mean_dims((v - p.frozen["reference"]) ** 2)
            loss = loss + self.kl_beta * metrics["kl"]
        return loss, {name: m.detach() for name, m in metrics.items()}

    def optimality(self, advantage: Tensor) -> Tensor:
        """Probability r in [0, 1] that the sample is a good one, (B,); an advantage of 0 is a half."""
        A = _part(self.clipped(advantage), self.adv_mode)
        return (A / self.adv_range / 2 + 0.5).clamp(0, 1)


def adaptive_distance(p: Point, v: Tensor) -> Tensor:
    """|x0 predicted by v - x0|^2 over its own mean absolute error, mean over dims: (B,) in float64."""
    # float64 since the method's code has it: near sigma = 0 both the error and its scale vanish.
    error = (x0_from(p.x, v, p.sigma) - given(p.x0, "x0")).double()
    w = mean_dims(error.detach().abs()).clamp(min=1e-5)
    return mean_dims(error**2) / w


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
