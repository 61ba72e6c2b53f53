"""The flow path between data and noise. Its convention is stated only here.

x_sigma = (1 - sigma) x0 + sigma eps and v = eps - x0, with sigma in [0, 1] and 1 = pure noise. Latents are (B, …);
sigma is always a float, a 0-d tensor, (B,) or (B, 1, …).
"""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if float64. Half precision overflows in the variance terms of a step."""
    return x if x.dtype == torch.float64 else x.float()


def expand(sigma: float | Tensor, like: Tensor) -> Tensor:
    """sigma as (B, 1, …), to broadcast with `like` (B, …), on its device and in its dtype, but at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    s = torch.as_tensor(sigma, dtype=dtype, device=like.device)
    return s if s.ndim > 1 else s.expand(like.shape[0]).reshape(-1, *[1] * (like.ndim - 1))


def mean_dims(x: Tensor) -> Tensor:
    """Mean over all dims but the batch: (B, …) → (B,)."""
    # Not x.mean(dim=tuple(range(1, x.ndim))): that tuple is empty for x (B,), and torch would average the batch.
    return x.reshape(x.shape[0], -1).mean(dim=1)


def interpolate(x0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
    """The state x_sigma on the path, (B, …)."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * eps


def velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """d x_sigma / d sigma, constant along the straight path."""
    return eps - x0


def x0_from(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean sample that velocity v predicts at x."""
    return x - expand(sigma, x) * v


def eps_from(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """The noise that velocity v predicts at x."""
    return x + (1 - expand(sigma, x)) * v


def shifted(u: Tensor, shift: float) -> Tensor:
    """The time u in [0, 1] moved towards the noise by a schedule's shift ≥ 1; 0 and 1 are fixed points."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: Tensor, shift: float) -> Tensor:
    """The inverse of `shifted`."""
    return sigma / (shift - (shift - 1) * sigma)
