"""How a frozen copy follows the live weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Follow:
    """copy ← d · copy + (1 - d) · live with d = decay(optimiser steps so far), after every step or every rollout."""

    decay: Callable[[int], float]
    every: Literal["step", "rollout"] = "rollout"


@dataclass(frozen=True)
class Average:
    """Decay of a moving average for evaluation: min((1 + k) / (10 + k), cap), Flow-GRPO's schedule."""

    cap: float = 0.9

    def __call__(self, k: int) -> float:
        return min((1 + k) / (10 + k), self.cap)
