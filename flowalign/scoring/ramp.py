"""Weights that change as training goes on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Ramp:
    """A weight that goes through `values` at `epochs` in straight lines, and stays level before and after."""

    def __init__(self, epochs: Sequence[int], values: Sequence[float]) -> None:
        if len(epochs) != len(values) or not epochs:
            raise ValueError(f"a ramp has a value for each of its epochs (got {len(values)} for {len(epochs)}).")
        if any(later <= earlier for earlier, later in zip(epochs, epochs[1:], strict=False)):
            raise ValueError(f"the epochs of a ramp ascend (got {list(epochs)}).")
        self.epochs, self.values = list(epochs), [float(value) for value in values]

    def __call__(self, epoch: float) -> float:
        """The weight of an epoch, the first being 0; of infinity, the last value."""
        return float(np.interp(epoch, self.epochs, self.values))
