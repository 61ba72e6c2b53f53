"""Which rows of a micro-batch may be compared: the samples of a group, mixed with the same noise at the same level."""

import torch

from flowalign.credit import Groups
from flowalign.types import Point, required


def compared(p: Point) -> Groups:
    """The rows of p, a noised point, by credit group and draw; only those that are in the loss count.

    One number of a noise tells it from every other one.
    """
    first = required(p.eps, "eps").flatten(1)[:, 0]
    keys = torch.stack([required(p.group, "group").double(), p.sigma.double(), first.double()], dim=1)
    return Groups.of(torch.unique(keys, dim=0, return_inverse=True)[1], p.counts)
