"""How a frozen copy follows the live weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flowalign.algorithms.decay import Decay


@dataclass(frozen=True)
class Follow:
    """copy ← d · copy + (1 - d) · live with d = decay(optimiser steps so far), after every step or every rollout.

    every="always": the live weights themselves; decay is then not asked. interval: with every="step", only where it
    divides k + 1, k the steps so far (Flow-GRPO's average: 8).
    """

    decay: Callable[[int], float]
    every: Literal["step", "rollout", "always"] = "rollout"
    interval: int = 1

    def __post_init__(self) -> None:
        if not callable(self.decay):
            raise ValueError(
                f"decay={self.decay} is no schedule: the published ones are written decay.kind=0, 1 or 2, of "
                "flowalign.algorithms.decay.Decay."
            )
        if self.interval < 1 or (self.interval > 1 and self.every != "step"):
            raise ValueError(
                f"a copy that follows after every {self.every} at an interval of {self.interval}: intervals count "
                "optimiser steps, from 1 on, and need every=step."
            )

    def due(self, when: Literal["step", "rollout"], steps: int) -> bool:
        """Whether the copy follows now, after so many optimiser steps."""
        return self.every == when and (steps + 1) % self.interval == 0

    def stays_live(self, steps_per_rollout: int) -> bool:
        """Whether the copy is the live weights at every optimiser step: it takes them over after each, or after the
        only one between two rollouts."""
        return self.every == "always" or (self.takes_over and (self.every == "step" or steps_per_rollout == 1))

    @property
    def takes_over(self) -> bool:
        """Whether nothing of the copy survives that follows, so that it is the live weights when a rollout begins."""
        return self.every == "always" or (isinstance(self.decay, Decay) and self.decay.cap == 0 and self.interval == 1)


@dataclass(frozen=True)
class Average:
    """Decay of a moving average for evaluation: min((1 + k) / (10 + k), cap), Flow-GRPO's schedule."""

    cap: float = 0.9

    def __call__(self, k: int) -> float:
        return min((1 + k) / (10 + k), self.cap)
