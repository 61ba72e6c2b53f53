"""Diversity of the images of a prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

AT_ONCE = 8192
"""Dims gathered at a time, since the latents of all ranks together may take many gigabytes."""


def diversity(x0: Tensor, group_size: int, gather: Callable[[Tensor], Tensor]) -> float:
    """Root mean square deviation from the group mean, over dims and samples; unbiased, 0 for identical samples.

    x0: (n, …) of this rank. gather: maps (n, k) to the (N, k) of all ranks in sample order, where groups are adjacent.
    Collective; bitwise identical for any number of ranks.
    """
    flat, total = x0.flatten(1), 0.0
    for part in flat.split(AT_ONCE, dim=1):
        groups = gather(part.contiguous()).cpu().double().unflatten(0, (-1, group_size))
        total += float(groups.var(dim=1).mean(dim=0).sum())
    return (total / flat.shape[1]) ** 0.5
