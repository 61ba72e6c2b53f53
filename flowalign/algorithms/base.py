"""An algorithm is a function of a point and the live velocity there; network, optimiser and processes are elsewhere."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.flow import at_least_float32, mean_dims
from flowalign.types import Point


class Algorithm(ABC):
    """One loss. Subclasses are a page: where they train, what they consult, and a formula."""

    point: ClassVar[Literal["transition", "noised"]]
    """Where on the path it trains; names the maker in flowalign.points."""
    stochastic: ClassVar[bool] = False
    """Whether it needs steps that have a density."""
    keeps_mean: ClassVar[bool] = False
    """Whether the rollout has to keep the means of its steps."""

    consults: ClassVar[tuple[str, ...]] = ()
    """Names of the frozen copies in its formula, e.g. ("old",)."""
    samples_with: ClassVar[str | None] = None
    """The frozen copy that makes the rollouts; None for the live weights."""
    source: Literal["rollout", "images", "both"] = "rollout"
    """What the points are made of: pictures of the policy, given ones of the prompts, or as many of each."""
    follows_reward: ClassVar[bool] = False
    """Whether the gradient of the reward is in its loss: the point then has the reward of where it `lands`."""
    together: ClassVar[Literal["point", "sample", "group"]] = "point"
    """Rows that must share a micro-batch, since the loss couples them."""
    shared_noise: ClassVar[bool] = False
    """Whether the members of a group get the same noise and noise level for their j-th re-noised point."""
    samples_per_group: ClassVar[int | None] = None
    """Train only on so many members k of each group, the best ⌈k/2⌉ and the worst ⌊k/2⌋; None for all."""
    least_micro: ClassVar[int] = 1
    """Rows that a micro-batch needs: 2 where they are compared with the others of it, whatever these are."""
    dynamics_only: ClassVar[tuple[str, ...]] = ()
    """Names of the dynamics that it is defined for; empty for all."""
    energy: ClassVar[bool] = False
    """Whether the credit must be FlowAWR's energies."""

    def __init__(self, kl_beta: float, adv_clip: float = 5.0) -> None:
        if kl_beta < 0:
            raise ValueError(f"kl_beta weighs a penalty and must be ≥ 0, where 0 switches it off (got {kl_beta}).")
        if adv_clip <= 0:
            raise ValueError(f"adv_clip bounds |advantage| and must be positive, usually 5 (got {adv_clip}).")
        self.kl_beta = kl_beta
        self.adv_clip = adv_clip

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen copies whose velocity it needs: those of its formula, the reference for a penalty."""
        penalised = ("reference",) if self.kl_beta > 0 else ()
        return tuple(dict.fromkeys(self.consults + penalised))

    @property
    def made_rollout(self) -> tuple[str, ...]:
        """Names of the frozen copies that its formula takes for the weights which made the rollout."""
        return ()

    @property
    def silent_at_zero(self) -> bool:
        """Whether a point with an advantage of 0 has neither loss nor gradient, nor a part in the loss of others."""
        return False

    @property
    def micro_matters(self) -> bool:
        """Whether the loss of a row depends on the others of its micro-batch, whatever they are."""
        return False

    @abstractmethod
    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss (B,) at the live velocity v (B, …), and detached metrics (B,)."""

    def lands(self, p: Point, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the reward judges where `follows_reward`: states (B, …) and their noise levels (B,)."""
        raise NotImplementedError(f"{type(self).__name__} follows the reward and needs lands().")

    def clipped(self, advantage: Tensor) -> Tensor:
        """Advantage (B,) within ±adv_clip."""
        return advantage.clamp(-self.adv_clip, self.adv_clip)

    def penalised(
        self, p: Point, v: Tensor, loss: Tensor, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `loss` returns: with the penalty on the way to the reference, if there is one, and metrics detached."""
        if self.kl_beta > 0:
            metrics["kl"] = self.penalty(p, v) if p.kl_weight is None else p.kl_weight * self.penalty(p, v)
            loss = loss + self.kl_beta * metrics["kl"]
        return loss, {name: m.detach() for name, m in metrics.items()}

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """Distance to the reference before its weight, (B,): |v - v_ref|^2, mean over dims."""
        return mean_dims((at_least_float32(v) - p.frozen["reference"]) ** 2)


def over_rows(p: Point, x: Tensor) -> Tensor:
    """Mean of x (B,) over the rows that are in the loss, (); 0 without any."""
    return (x * p.counts).sum() / p.counts.sum().clamp(min=1)


def pessimistic(A: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """max(-A ρ, -A clamp(ρ, 1 - clip, 1 + clip)), (B,): the clipped policy gradient of PPO (arXiv:1707.06347)."""
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip))


def optimality(A: Tensor, at_most: float) -> Tensor:
    """Advantage (B,) as a number in [0, 1]: 0 at -at_most, a half at 0, 1 at at_most."""
    return (A / at_most / 2 + 0.5).clamp(0, 1)
