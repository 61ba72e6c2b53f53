"""Advantage-weighted matching, AWM (arXiv:2509.25050): policy gradient with flow matching instead of a likelihood."""

from typing import ClassVar, Literal, get_args

from torch import Tensor

from flowalign.algorithms.base import Algorithm, pessimistic
from flowalign.algorithms.errors import matching
from flowalign.credit import Groups
from flowalign.flow import at_least_float32, mean_dims
from flowalign.types import Point, required

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


class AWM(Algorithm):
    """PPO's clipped loss with log p = -weighting(|v - (eps - x0)|^2) and advantages in ±advantage_max.

    ratio="exp_first" computes one ratio per noised point, "sum_first" one per sample, from the mean of its log p.
    ema_beta penalises the distance to "anchor", a copy that follows the live weights quickly. On policy, the old log p
    is the live one and the ratio is 1. off_policy=True takes the old log p from "old", for several updates per rollout
    (frozen.old.decay.kind=0).
    """

    point: ClassVar[Literal["transition", "noised"]] = "noised"
    together: ClassVar[Literal["point", "sample", "group"]] = "sample"

    def __init__(
        self,
        weighting: Weighting = "ghuber",
        ratio: Literal["exp_first", "sum_first"] = "exp_first",
        clip: float = 1.0,
        adv_clip: float = 5.0,
        advantage_max: float = 1.0,
        kl_beta: float = 0.0,
        ema_beta: float = 1.0,
        kl: Literal["uniform", "elbo"] = "uniform",
        power: float = 0.25,
        off_policy: bool = False,
    ) -> None:
        """kl: how both penalties are weighted across noise levels; power: exponent of "ghuber", where 1 equals "t"."""
        super().__init__(kl_beta, adv_clip)
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting is one of {', '.join(get_args(Weighting))} (got {weighting!r}).")
        if ratio not in ("exp_first", "sum_first"):
            raise ValueError(f'ratio is "exp_first" or "sum_first" (got {ratio!r}).')
        if kl not in ("uniform", "elbo"):
            raise ValueError(f'kl is "uniform" or "elbo" (got {kl!r}).')
        if min(clip, advantage_max, power) <= 0 or ema_beta < 0:
            raise ValueError(
                f"clip, advantage_max and power must be positive and ema_beta 0 or more (got clip={clip}, "
                f"advantage_max={advantage_max}, power={power}, ema_beta={ema_beta})."
            )
        self.weighting: Weighting = weighting
        self.ratio = ratio
        self.clip = clip
        self.advantage_max = advantage_max
        self.ema_beta = ema_beta
        self.kl = kl
        self.power = power
        self.off_policy = off_policy

    @property
    def frozen(self) -> tuple[str, ...]:
        """The copies of the base class, plus "old" if off policy and "anchor" if ema_beta > 0."""
        return (*self.made_rollout, *(("anchor",) if self.ema_beta > 0 else ()), *super().frozen)

    @property
    def made_rollout(self) -> tuple[str, ...]:
        """The copy "old" if off policy, since it computes the old log p."""
        return ("old",) if self.off_policy else ()

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a noised point."""
        log_p = self.log_prob(p, v)
        log_old = self.log_prob(p, p.frozen["old"]) if self.off_policy else log_p.detach()
        if self.ratio == "sum_first":
            samples = Groups.of(required(p.sample, "sample"))
            log_p, log_old = samples.mean(log_p), samples.mean(log_old)
        ratio = (log_p - log_old).exp()
        A = self.clipped(p.advantage) / self.adv_clip * self.advantage_max
        loss = pessimistic(A, ratio, self.clip)
        clipped = ((ratio - 1).abs() > self.clip).to(ratio.dtype)
        metrics = {"ratio": ratio, "clip_fraction": clipped, "log_prob": log_p, "advantage": A}
        if self.ema_beta > 0:
            metrics["kl_anchor"] = self._distance(p, v, "anchor")
            loss = loss + self.ema_beta * metrics["kl_anchor"]
        return self.penalised(p, v, loss, metrics)

    def log_prob(self, p: Point, v: Tensor) -> Tensor:
        """Surrogate log-likelihood of the sample, (B,) in float64; it decreases with the matching error m."""
        m, t = matching(p, v), p.sigma.double()
        if self.weighting == "uniform":
            return -m
        if self.weighting == "t":
            return -m * t
        if self.weighting == "t2":
            return -m * t**2
        m = m + 1e-10  # keeps the gradient of the root finite
        if self.weighting == "huber":
            return -(m**0.5 - 1e-5) * t
        return -(m**self.power - 1e-10**self.power) * t / self.power

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """|v - v_ref|^2, (B,); with kl="elbo" divided by 2 g^2 with Flow-SDE's noise rate g^2 = 0.49 t / (1 - t)."""
        return self._distance(p, v, "reference")

    def _distance(self, p: Point, v: Tensor, name: str) -> Tensor:
        square = mean_dims((at_least_float32(v) - p.frozen[name]) ** 2)
        if self.kl == "uniform":
            return square
        return square / (2 * 0.7**2 * p.sigma / (1 - p.sigma.clamp(max=0.99)))
