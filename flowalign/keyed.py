"""Stateless random numbers, keyed by (seed, epoch, sample, stream).

A draw depends neither on the batch nor on the number of processes, and there is no state to save: a resumed run draws
the same numbers as an uninterrupted one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowalign.transfer import empty_for, to_device

INITIAL = 0
"""Stream of the initial noise."""
STEP = 1000
"""Stream STEP + i: noise of step i."""
POINT = 2000
"""Stream POINT + j: noise of the j-th re-noised point of a sample."""
ORDER = 3000
"""Stream of the noise levels at which a sample is re-noised."""
CHOICE = 4000
"""Stream of choices that an epoch makes once for all samples."""
PICTURE = 5000
"""Stream of the choice among a prompt's given images."""
REAL = 6000
"""Stream REAL + j: noise of the j-th re-noised point of a given image, where the sample has points of its own too."""
PENALTY = 7000
"""Stream of the choice of a sample's points with a KL penalty."""
TURN = 9000
"""Stream TURN + i: order of the training points in the i-th pass; the key's sample number is the rank."""


def keyed_integer(seed: int, epoch: int, sample: int, stream: int) -> int:
    """A 32-bit number for a key of non-negative integers."""
    # SeedSequence mixes the four numbers; their sum would give (0, 1) and (1, 0) the same noise.
    return int(np.random.SeedSequence((seed, epoch, sample, stream)).generate_state(1)[0])


def keyed_generator(seed: int, epoch: int, sample: int, stream: int) -> torch.Generator:
    """A CPU generator for a key of non-negative integers."""
    # torch's CPU generator uses 32 bits of its seed. Collisions among many thousands of keys are possible and harmless.
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
    """Standard normal noise (B, *shape) in float32, drawn on the CPU so that it is the same on every device."""
    samples = id_list(sample_ids)
    noise = empty_for((len(samples), *shape), device)
    for row, sample in zip(noise, samples, strict=True):
        row.normal_(generator=keyed_generator(seed, epoch, sample, stream))
    return to_device(noise, device)
