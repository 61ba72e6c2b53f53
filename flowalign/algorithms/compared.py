"""Rows of a micro-batch that can be compared: samples of one group with the same noise at the same noise level."""

import torch

from flowalign.credit import Groups
from flowalign.types import Point, required


def compared(p: Point) -> Groups:
    """Group the rows of p, a noised point, by credit group, noise level and noise; rows outside the loss do not count.

    The first element of a noise tensor identifies it.
    """
    first = required(p.eps, "eps").flatten(1)[:, 0]
    keys = torch.stack([required(p.group, "group").double(), p.sigma.double(), first.double()], dim=1)
    return Groups.of(torch.unique(keys, dim=0, return_inverse=True)[1], p.counts)
