"""Flow-GRPO (arXiv:2505.05470): clipped policy gradient on recorded transitions."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm, pessimistic
from flowalign.dynamics import Dynamics
from flowalign.types import Point, required


class GRPO(Algorithm):
    """max(-A ρ, -A clamp(ρ, 1 - clip, 1 + clip)) + kl_beta KL with ρ the density of a recorded step, live over old.

    The log-density is a mean over dims, hence clip ranges as small as 1e-4 (Flow-SDE) or 1e-5 (CPS).
    Variants override `log_ratio`, `surrogate` or `weight`.
    """

    point: ClassVar[Literal["transition", "noised"]] = "transition"
    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        dynamics: Dynamics,
        clip: float = 1e-4,
        adv_clip: float = 5.0,
        kl_beta: float = 0.0,
        kl: Literal["x", "gaussian", "v"] = "x",
    ) -> None:
        """kl: "x", the published penalty of the dynamics; "gaussian", the KL of the step; "v", |v - v_ref|^2."""
        super().__init__(kl_beta, adv_clip)
        if not dynamics.stochastic:
            raise ValueError(
                f"GRPO needs the density of a step, but {type(dynamics).__name__} is deterministic: "
                "use FlowSDE or CPS with eta > 0, or algo=nft."
            )
        if self.dynamics_only and type(dynamics).__name__ not in self.dynamics_only:
            raise ValueError(
                f"{type(self).__name__} is defined for {' and '.join(self.dynamics_only)} only "
                f"(got {type(dynamics).__name__}); GRPO takes any stochastic dynamics."
            )
        if clip <= 0:
            raise ValueError(f"clip is the half-width of the trusted ratio range and must be positive (got {clip}).")
        if kl not in ("x", "gaussian", "v"):
            raise ValueError(f'kl is "x", "gaussian" or "v" (got {kl!r}).')
        self.dynamics = dynamics
        self.clip = clip
        self.kl = kl

    @property
    def silent_at_zero(self) -> bool:
        """True without the penalty, since the policy term is proportional to the advantage."""
        return self.kl_beta == 0

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics at a transition point."""
        mean, std = self._moments(p, v)
        log_ratio = self.log_ratio(p, mean, std)
        ratio = log_ratio.exp()
        A = self.clipped(p.advantage)
        policy, outside = self.surrogate(p, A, ratio, mean, std)
        metrics = {
            "ratio": ratio,
            "clip_fraction": outside.to(ratio.dtype),
            # Not ρ - 1 - log ρ: with ratios this close to 1, that is only rounding error in float32.
            "approx_kl": 0.5 * log_ratio**2,
            "advantage": A,
        }
        return self.penalised(p, v, self.weight(p, std) * policy, metrics)

    def log_ratio(self, p: Point, mean: Tensor, std: Tensor) -> Tensor:
        """log ρ of the recorded step, (B,)."""
        return self.dynamics.log_prob(required(p.x_next, "x_next"), mean, std) - required(p.log_prob, "log_prob")

    def surrogate(self, p: Point, A: Tensor, ratio: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """The policy term, and whether the ratio has left the range in which it is trusted, both (B,)."""
        del p, mean, std
        return pessimistic(A, ratio, self.clip), (ratio - 1).abs() > self.clip

    def weight(self, p: Point, std: Tensor) -> Tensor:
        """Weight ≥ 0 of the policy term of each step, (B,)."""
        del std
        return torch.ones_like(p.advantage)

    def _moments(self, p: Point, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.dynamics.moments(p.x, v, p.sigma, required(p.sigma_next, "sigma_next"), p.sigma_max)

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """Distance to the reference chosen by `kl`, (B,)."""
        if self.kl == "v":
            return super().penalty(p, v)
        mean, std = self._moments(p, v)
        mean_ref, _ = self._moments(p, p.frozen["reference"])
        if self.kl == "gaussian":
            return self.dynamics.gaussian_kl(mean, mean_ref, std)
        return self.dynamics.kl(mean, mean_ref, std, p.sigma, required(p.sigma_next, "sigma_next"))
