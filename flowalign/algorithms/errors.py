"""Errors of a velocity at a noised point. All are float64, because near sigma = 0 an error and its scale both vanish.

Differences are computed in float32 or better, whatever the precision of their terms.
"""

from torch import Tensor

from flowalign.flow import at_least_float32, mean_dims, velocity, x0_from
from flowalign.types import Point, required


def v_error(p: Point, v: Tensor) -> Tensor:
    """v - (eps - x0), (B, …)."""
    x0, eps = at_least_float32(required(p.x0, "x0")), at_least_float32(required(p.eps, "eps"))
    return (at_least_float32(v) - velocity(x0, eps)).double()


def x0_error(p: Point, v: Tensor) -> Tensor:
    """Clean sample predicted by v minus the true one, (B, …)."""
    x, x0 = at_least_float32(p.x), at_least_float32(required(p.x0, "x0"))
    return (x0_from(x, at_least_float32(v), p.sigma) - x0).double()


def matching(p: Point, v: Tensor) -> Tensor:
    """|v - (eps - x0)|^2, mean over dims, (B,): the flow matching loss."""
    return mean_dims(v_error(p, v) ** 2)


def size(error: Tensor) -> Tensor:
    """Mean absolute error, (B,), detached and at least 1e-5: the denominator of adaptive losses."""
    return mean_dims(error.detach().abs()).clamp(min=1e-5)


def adaptive(error: Tensor) -> Tensor:
    """error^2 divided by its own size, mean over dims, (B,), which gives all noise levels the same weight."""
    return mean_dims(error**2) / size(error)
