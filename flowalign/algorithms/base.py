"""Base class of algorithms: pure functions of a point and the live velocity, without network, optimiser or ranks."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowalign.flow import at_least_float32, mean_dims
from flowalign.types import Point


class Algorithm(ABC):
    """A loss. A subclass declares the points it trains on and the frozen copies it needs, and implements a formula."""

    point: ClassVar[Literal["transition", "noised"]]
    """Kind of training points: recorded transitions or re-noised samples, both made in flowalign.points."""
    stochastic: ClassVar[bool] = False
    """Whether the recorded steps must have a density."""
    keeps_mean: ClassVar[bool] = False
    """Whether the rollout must record the means of its steps."""

    consults: ClassVar[tuple[str, ...]] = ()
    """Names of the frozen copies in the formula, e.g. ("old",)."""
    samples_with: ClassVar[str | None] = None
    """The frozen copy that generates the rollouts; None: the live weights."""
    source: Literal["rollout", "images", "both"] = "rollout"
    """Where the clean samples come from: the policy, the given images of the prompts, or equally many of each."""
    follows_reward: ClassVar[bool] = False
    """Whether the loss needs the gradient of the reward. The point then carries the reward of where it `lands`."""
    together: ClassVar[Literal["point", "sample", "group"]] = "point"
    """Rows that must share a micro-batch because the loss couples them."""
    shared_noise: ClassVar[bool] = False
    """Whether the members of a group share the noise and noise level of their j-th re-noised point."""
    samples_per_group: ClassVar[int | None] = None
    """Train on k members of each group only, the best ⌈k/2⌉ and the worst ⌊k/2⌋; None: all."""
    least_micro: ClassVar[int] = 1
    """Minimum rows of a micro-batch: 2 if each row is compared with the others, whichever they are."""
    dynamics_only: ClassVar[tuple[str, ...]] = ()
    """Class names of the dynamics it is defined for; empty: all."""
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
        """Names of the frozen copies whose velocity it needs: those of the formula, the reference if kl_beta > 0."""
        penalised = ("reference",) if self.kl_beta > 0 else ()
        return tuple(dict.fromkeys(self.consults + penalised))

    @property
    def made_rollout(self) -> tuple[str, ...]:
        """Names of the frozen copies that the formula assumes to be the weights that generated the rollout."""
        return ()

    @property
    def silent_at_zero(self) -> bool:
        """Whether a point with advantage 0 has no loss, no gradient, and no effect on the loss of other points."""
        return False

    @property
    def micro_matters(self) -> bool:
        """Whether the loss of a row depends on which other rows share its micro-batch."""
        return False

    @abstractmethod
    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the per-sample loss (B,) at the live velocity v (B, …), and detached metrics (B,)."""

    def lands(self, p: Point, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the reward judges if `follows_reward`: states (B, …) and their noise levels (B,)."""
        raise NotImplementedError(f"{type(self).__name__} follows the reward and needs lands().")

    def clipped(self, advantage: Tensor) -> Tensor:
        """Advantage (B,) clamped to ±adv_clip."""
        return advantage.clamp(-self.adv_clip, self.adv_clip)

    def penalised(
        self, p: Point, v: Tensor, loss: Tensor, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the weighted penalty, if kl_beta > 0, and detach the metrics. The result is what `loss` returns."""
        if self.kl_beta > 0:
            metrics["kl"] = self.penalty(p, v) if p.kl_weight is None else p.kl_weight * self.penalty(p, v)
            loss = loss + self.kl_beta * metrics["kl"]
        return loss, {name: m.detach() for name, m in metrics.items()}

    def penalty(self, p: Point, v: Tensor) -> Tensor:
        """Unweighted distance to the reference, (B,): |v - v_ref|^2, mean over dims."""
        return mean_dims((at_least_float32(v) - p.frozen["reference"]) ** 2)


def over_rows(p: Point, x: Tensor) -> Tensor:
    """Mean of x (B,) over the rows that count in the loss, (); 0 if there are none."""
    return (x * p.counts).sum() / p.counts.sum().clamp(min=1)


def pessimistic(A: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """max(-A ρ, -A clamp(ρ, 1 - clip, 1 + clip)), (B,): the clipped policy gradient of PPO (arXiv:1707.06347)."""
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip))


def optimality(A: Tensor, bound: float) -> Tensor:
    """Map the advantage (B,) linearly to [0, 1]: 0 at -bound, 1/2 at 0, 1 at bound."""
    return (A / bound / 2 + 0.5).clamp(0, 1)
