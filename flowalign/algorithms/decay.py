"""Decay schedule of the old policy, a moving average of the live one."""

from collections.abc import Sequence

PUBLISHED = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}
"""DiffusionNFT's decay types as (flat, rate, cap): 0 copies at every update, 1 is the default, 2 is for OCR."""


class Decay:
    """Decay d after k optimiser steps, in old ← d old + (1 - d) live.

    d is 0 for the first `flat` steps, then grows from `start` by `rate` per step, up to `cap`.
    """

    def __init__(self, kind: int | Sequence[float] = 1, start: float = 0.0) -> None:
        """kind: one of DiffusionNFT's types 0, 1, 2, or (flat, rate, cap); AWM and DGPO use (0, 0.001, 0.3)."""
        numbers = PUBLISHED.get(kind, ()) if isinstance(kind, int) else tuple(kind)
        if len(numbers) != 3:
            raise ValueError(f"a decay is 0, 1, 2 or the three numbers (flat, rate, cap) (got {kind}).")
        self.flat, self.rate, self.cap = numbers
        self.start = start
        if self.rate < 0 or not 0 <= start <= self.cap <= 1:
            raise ValueError(
                f"a decay needs rate ≥ 0 and 0 ≤ start ≤ cap ≤ 1 (got rate={self.rate}, start={start}, cap={self.cap})."
            )

    def __call__(self, k: int) -> float:
        """Return d, the weight of the old policy in the update."""
        return 0.0 if k < self.flat else min(self.start + self.rate * (k - self.flat), self.cap)
