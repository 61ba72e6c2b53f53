"""Randomness as a function of (seed, epoch, sample, stream).

A draw depends neither on the batch a sample happens to sit in nor on the number of processes, and there is no state to
save: a resumed run draws what the uninterrupted one would have drawn.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowalign.transfer import empty_for, to_device

INITIAL = 0
"""Stream of the noise a walk starts from."""
STEP = 1000
"""Stream STEP + i: noise of step i."""
POINT = 2000
"""Stream POINT + j: noise of the j-th re-noised point of a sample."""
ORDER = 3000
"""Stream of the order in which a sample visits the noise levels."""
CHOICE = 4000
"""Stream of choices an epoch makes once for all samples."""
PICTURE = 5000
"""Stream of the given picture that a sample is made of."""
REAL = 6000
"""Stream REAL + j: noise of the j-th re-noised point of a given picture, where the sample has its own points too."""
PENALTY = 7000
"""Stream of the points of a sample at which the way to the reference is penalised."""
TURN = 9000
"""Stream TURN + i: order of the training points in the i-th pass; the sample number in the key is the rank."""


def keyed_integer(seed: int, epoch: int, sample: int, stream: int) -> int:
    """A number of 32 bits for one key of non-negative integers."""
    # SeedSequence mixes the four numbers; a sum of them would give (0, 1) and (1, 0) the same noise.
    return int(np.random.SeedSequence((seed, epoch, sample, stream)).generate_state(1)[0])


def keyed_generator(seed: int, epoch: int, sample: int, stream: int) -> torch.Generator:
    """A CPU generator of its own for one key of non-negative integers."""
    # torch's CPU generator uses 32 bits of its seed, so that among many thousands of keys two can coincide, which does
    # no harm.
    return torch.Generator().manual_seed(keyed_integer(seed, epoch, sample, stream))


def id_list(sample_ids: Sequence[int] | Tensor) -> list[int]:
    """Global sample numbers as Python integers."""
    return sample_ids.tolist() if isinstance(sample_ids, Tensor) else list(sample_ids)


def keyed_randn(
    seed: int,
    epoch: int,
    sample_ids: Sequence[int] | Tensor,
    stream: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise (B, *shape) in float32, drawn on the CPU so that every device sees the same numbers."""
    samples = id_list(sample_ids)
    noise = empty_for((len(samples), *shape), device)
    for row, sample in zip(noise, samples, strict=True):
        row.normal_(generator=keyed_generator(seed, epoch, sample, stream))
    return to_device(noise, device)
