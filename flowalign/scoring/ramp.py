"""Reward weights that change during training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Ramp:
    """A weight interpolated linearly between `values` at `epochs`, and constant before the first and after the last."""

    def __init__(self, epochs: Sequence[int], values: Sequence[float]) -> None:
        if len(epochs) != len(values) or not epochs:
            raise ValueError(f"a ramp has a value for each of its epochs (got {len(values)} for {len(epochs)}).")
        if any(later <= earlier for earlier, later in zip(epochs, epochs[1:], strict=False)):
            raise ValueError(f"the epochs of a ramp ascend (got {list(epochs)}).")
        self.epochs, self.values = list(epochs), [float(value) for value in values]

    def __call__(self, epoch: float) -> float:
        """The weight in an epoch, counted from 0; math.inf gives the last value."""
        return float(np.interp(epoch, self.epochs, self.values))
