"""Flow-GRPO (arXiv:2505.05470): clipped policy gradient on replayed transitions."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.dynamics import Dynamics
from flowalign.flow import at_least_float32, mean_dims
from flowalign.types import Point, given


class GRPO(Algorithm):
    """max(-A ρ, -A clamp(ρ, 1 - clip, 1 + clip)) + kl_beta KL, with ρ the density of a recorded step, live over old.

    The log-density is a mean over dims, hence clip ranges as small as 1e-4 (Flow-SDE) or 1e-5 (CPS).
    A variant overrides `log_ratio` or `weight`.
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
        """kl: "x", the published penalty of the dynamics; "gaussian", that of the step; "v", |v - v_ref|^2."""
        super().__init__(kl_beta, adv_clip)
        if not dynamics.stochastic:
            raise ValueError(
                f"GRPO needs the density of a step, but {type(dynamics).__name__} is deterministic: "
                "use FlowSDE or CPS with eta > 0, or algo=nft."
            )
        if clip <= 0:
            raise ValueError(f"clip is the half-width of the ratio's trusted range, hence positive (got {clip}).")
        if kl not in ("x", "gaussian", "v"):
            raise ValueError(f'kl is "x", "gaussian" or "v" (got {kl!r}).')
        self.dynamics = dynamics
        self.clip = clip
        self.kl = kl

    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See the base class; p is a transition point."""
        mean, std = self._moments(p, v)
        log_ratio = self.log_ratio(p, mean, std)
        ratio = log_ratio.exp()
        A = self.clipped(p.advantage)
        policy = torch.maximum(-A * ratio, -A * ratio.clamp(1 - self.clip, 1 + self.clip))
        loss = self.weight(p, std) * policy
        metrics = {
            "ratio": ratio,
            "clip_fraction": ((ratio - 1).abs() > self.clip).to(ratio.dtype),
            # Not ρ - 1 - log ρ: with ratios this close to 1 that difference is all rounding in float32.
            "approx_kl": 0.5 * log_ratio**2,
            "advantage": A,
        }
        if self.kl_beta > 0:
            metrics["kl"] = self._kl(p, v, mean, std)
            loss = loss + self.kl_beta * metrics["kl"]
        return loss, {name: m.detach() for name, m in metrics.items()}

    def log_ratio(self, p: Point, mean: Tensor, std: Tensor) -> Tensor:
        """log ρ of the recorded step, (B,)."""
        return self.dynamics.log_prob(given(p.x_next, "x_next"), mean, std) - given(p.log_prob, "log_prob")

    def weight(self, p: Point, std: Tensor) -> Tensor:
        """Factor ≥ 0 of the policy term for each step, (B,)."""
        del std
        return torch.ones_like(p.advantage)

    def _moments(self, p: Point, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.dynamics.moments(p.x, v, p.sigma, given(p.sigma_next, "sigma_next"), p.sigma_max)

    def _kl(self, p: Point, v: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        v_ref = p.frozen["reference"]
        if self.kl == "v":
            return mean_dims((at_least_float32(v) - v_ref) ** 2)
        mean_ref, _ = self._moments(p, v_ref)
        if self.kl == "gaussian":
            return self.dynamics.gaussian_kl(mean, mean_ref, std)
        return self.dynamics.kl(mean, mean_ref, std, p.sigma, given(p.sigma_next, "sigma_next"))
