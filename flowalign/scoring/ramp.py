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


def product(weight: float | Ramp, factor: float | Ramp) -> float | Ramp:
    """The product of two weights, at most one of which changes during training; ValueError if both do."""
    if isinstance(factor, Ramp):
        weight, factor = factor, weight
    if isinstance(factor, Ramp):
        raise ValueError("a weight that changes during training cannot multiply another one that does.")
    return Ramp(weight.epochs, [v * factor for v in weight.values]) if isinstance(weight, Ramp) else weight * factor
