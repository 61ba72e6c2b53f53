"""How far the pictures of a prompt are from each other."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

AT_ONCE = 8192
"""Dims that are gathered at a time: the latents of all ranks together may be many gigabytes."""


def diversity(x0: Tensor, group_size: int, gather: Callable[[Tensor], Tensor]) -> float:
    """Root mean square deviation, over dims and samples, from the mean of a group; unbiased, 0 for copies.

    x0 (n, …) of this rank; gather: (n, k) to the (N, k) of all ranks in sample order, where groups are neighbours. All
    ranks together; the same to the last bit for any number of them.
    """
    flat, total = x0.flatten(1), 0.0
    for part in flat.split(AT_ONCE, dim=1):
        groups = gather(part.contiguous()).cpu().double().unflatten(0, (-1, group_size))
        total += float(groups.var(dim=1).mean(dim=0).sum())
    return (total / flat.shape[1]) ** 0.5
