"""Fewer steps after the last stochastic one (MixGRPO-Flash)."""

import torch
from torch import Tensor

from flowalign.flow import shifted, unshifted


def shorten(sigmas: Tensor, last: int, share: float, shift: float) -> Tensor:
    """Keep the schedule (T+1,) up to the end of step `last`, then space evenly in unshifted time to 0: (last + M + 1,).

    M = max(2, int(share (T - last))) points from sigmas[last + 1] on, hence M - 1 steps. The authors' code also
    allows a single point, which leaves noise in the image.
    """
    if last < 0 or last + 2 == len(sigmas):  # no stochastic step, or none after it
        return sigmas
    points = max(2, int((len(sigmas) - 1 - last) * share))
    u = unshifted(sigmas[last + 1].double(), shift)
    rest = shifted(torch.linspace(1, 0, points, dtype=torch.float64, device=sigmas.device)[1:] * u, shift)
    return torch.cat([sigmas[: last + 2], rest.to(sigmas.dtype)])
