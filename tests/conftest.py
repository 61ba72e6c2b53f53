"""Shared fixtures: the reference vectors and the measure they are compared with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Callable[[str], dict]:
    """Loader of one reference file: numeric arrays as tensors, the others as they are."""

    def load(name: str) -> dict:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(a) if a.dtype.kind in "fi" else a for key, a in arrays.items()}

    return load


@pytest.fixture
def agrees() -> Callable[[Tensor, Tensor, float], bool]:
    """max |ours - theirs| ≤ tolerance · max |theirs|, for equal shapes."""

    def compare(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        ours, theirs = ours.detach().double(), theirs.double()
        return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())

    return compare
