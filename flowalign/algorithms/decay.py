"""How slowly the old policy follows the live one."""

from collections.abc import Sequence

PUBLISHED = {0: (0, 0.0, 0.0), 1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}
"""DiffusionNFT's types as (flat, rate, cap): 0 copies every time, 1 is the default, 2 is for OCR."""


class Decay:
    """d in old ← d old + (1 - d) live, after k optimiser steps: 0 for `flat` steps, then rate per step up to `cap`."""

    def __init__(self, kind: int | Sequence[float] = 1) -> None:
        """kind: one of DiffusionNFT's types 0, 1, 2, or (flat, rate, cap)."""
        numbers = PUBLISHED.get(kind, ()) if isinstance(kind, int) else tuple(kind)
        if len(numbers) != 3:
            raise ValueError(f"a decay is 0, 1, 2 or the three numbers (flat, rate, cap) (got {kind}).")
        self.flat, self.rate, self.cap = numbers
        if self.rate < 0 or not 0 <= self.cap <= 1:
            raise ValueError(f"a decay needs rate ≥ 0 and cap in [0, 1] (got rate={self.rate}, cap={self.cap}).")

    def __call__(self, k: int) -> float:
        """The share of the old policy which survives the update."""
        return 0.0 if k < self.flat else min(self.rate * (k - self.flat), self.cap)
