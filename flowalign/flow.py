"""The path between data and noise, and the only place that states its convention.

x_sigma = (1 - sigma) x0 + sigma eps and v = eps - x0, with sigma in [0, 1] and 1 = pure noise. Latents are (B, …);
sigma is a float, a 0-d tensor, (B,) or (B, 1, …) everywhere.
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged in float64. Half precision overflows in the variance terms of a step."""
    return x if x.dtype == torch.float64 else x.float()


def expand(sigma: float | Tensor, like: Tensor) -> Tensor:
    """sigma as (B, 1, …) beside `like` (B, …): same device, same precision, though never below float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    s = torch.as_tensor(sigma, dtype=dtype, device=like.device)
    return s if s.ndim > 1 else s.expand(like.shape[0]).reshape(-1, *[1] * (like.ndim - 1))


def mean_dims(x: Tensor) -> Tensor:
    """Mean over everything but the batch: (B, …) → (B,)."""
    # Not x.mean(dim=tuple(range(1, x.ndim))): that tuple is empty for x (B,), and torch would average the batch.
    return x.reshape(x.shape[0], -1).mean(dim=1)


def interpolate(x0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
    """The point of the path at sigma, (B, …)."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """d x_sigma / d sigma, constant along the straight path."""
    return eps - x0


def x0_from(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean sample which v points back to from x."""
    return x - expand(sigma, x) * v


def eps_from(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """The noise which v points at from x."""
    return x + (1 - expand(sigma, x)) * v


def shifted(u: Tensor, shift: float) -> Tensor:
    """The time u in [0, 1] moved towards the noise by a schedule's shift ≥ 1; 0 and 1 stay where they are."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: Tensor, shift: float) -> Tensor:
    """The inverse of `shifted`."""
    return sigma / (shift - (shift - 1) * sigma)
