"""Update rules of the frozen copies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flowalign.algorithms.decay import Decay

log = logging.getLogger("flowalign")


@dataclass(frozen=True)
class Follow:
    """copy ← d · copy + (1 - d) · live with d = decay(k) for k optimiser steps so far, after each step or rollout.

    every="always": the live weights themselves; decay is then unused. interval: with every="step", update only if it
    divides k + 1 (Flow-GRPO's average: 8).
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
        """Whether the copy is updated now, after `steps` optimiser steps."""
        return self.every == when and (steps + 1) % self.interval == 0

    def warn_if_waiting(self, name: str, steps: int) -> None:
        """Warn if the copy `name`, which is about to be used, still holds the initial weights after `steps` steps."""
        if self.every == "step" and steps + 1 < self.interval:
            log.warning(
                "frozen.%s follows every %d optimiser steps, and there were %d: it still holds the weights from before "
                "training. Train for longer, set frozen.%s.interval=1, or use the live weights.",
                *(name, self.interval, steps, name),
            )

    def stays_live(self, steps_per_rollout: int) -> bool:
        """Whether the copy equals the live weights before each optimiser step: it is overwritten after each step, or
        after each rollout of a single step."""
        return self.every == "always" or (self.takes_over and (self.every == "step" or steps_per_rollout == 1))

    @property
    def takes_over(self) -> bool:
        """Whether an update overwrites the copy completely, so that it equals the live weights at each rollout."""
        return self.every == "always" or (isinstance(self.decay, Decay) and self.decay.cap == 0 and self.interval == 1)


@dataclass(frozen=True)
class Average:
    """Decay of a moving average for evaluation: min((1 + k) / (10 + k), cap), Flow-GRPO's schedule."""

    cap: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.cap <= 1:
            raise ValueError(f"the cap of an average is the largest share that is kept, in [0, 1] (got {self.cap}).")

    def __call__(self, k: int) -> float:
        return min((1 + k) / (10 + k), self.cap)
