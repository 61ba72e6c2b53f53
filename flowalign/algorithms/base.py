"""An algorithm is a function of a point and the live velocity there; network, optimiser and processes are elsewhere."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from flowalign.types import Point


class Algorithm(ABC):
    """One loss. Subclasses are a page: where they train, what they consult, and a formula."""

    point: ClassVar[Literal["transition", "noised"]]
    """Where on the path it trains; names the maker in flowalign.points."""
    stochastic: ClassVar[bool] = False
    """Whether it needs steps that have a density."""
    keeps_mean: ClassVar[bool] = False
    """Whether the rollout has to keep the means of its steps."""

    samples_with: ClassVar[str | None] = None
    """The frozen copy that makes the rollouts; None for the live weights."""
    source: ClassVar[Literal["rollout", "images"]] = "rollout"
    """What the points are made of: pictures of the policy, or given ones."""
    together: ClassVar[Literal["point", "sample", "group"]] = "point"
    """Rows that must share a micro-batch, since the loss couples them."""
    shared_noise: ClassVar[bool] = False
    """Whether the members of a group get the same noise and noise level for their j-th re-noised point."""
    samples_per_group: ClassVar[int | None] = None
    """Train only on so many members of each group, those with the largest |advantage|; None for all."""
    dynamics_only: ClassVar[tuple[str, ...]] = ()
    """Names of the dynamics that it is defined for; empty for all."""
    energy: ClassVar[bool] = False
    """Whether the credit must be FlowAWR's energies."""

    def __init__(self, kl_beta: float, adv_clip: float) -> None:
        if kl_beta < 0:
            raise ValueError(f"kl_beta weighs a penalty and must be ≥ 0, where 0 switches it off (got {kl_beta}).")
        if adv_clip <= 0:
            raise ValueError(f"adv_clip bounds |advantage| and must be positive, usually 5 (got {adv_clip}).")
        self.kl_beta = kl_beta
        self.adv_clip = adv_clip

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen copies whose velocity it consults: the reference only if there is a penalty."""
        return ("reference",) if self.kl_beta > 0 else ()

    @abstractmethod
    def loss(self, p: Point, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-sample loss (B,) at the live velocity v (B, …), and detached metrics (B,)."""

    def clipped(self, advantage: Tensor) -> Tensor:
        """Advantage (B,) within ±adv_clip."""
        return advantage.clamp(-self.adv_clip, self.adv_clip)
