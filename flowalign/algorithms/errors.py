"""How wrong a velocity is at a noised point. All in float64: near sigma = 0 an error and its scale both vanish.

Differences are taken in float32 or better, whatever their terms are kept in.
"""

from torch import Tensor

from flowalign.flow import at_least_float32, mean_dims, velocity, x0_from
from flowalign.types import Point, required


def v_error(p: Point, v: Tensor) -> Tensor:
    """v - (eps - x0), (B, …)."""
    x0, eps = at_least_float32(required(p.x0, "x0")), at_least_float32(required(p.eps, "eps"))
    return (at_least_float32(v) - velocity(x0, eps)).double()


def x0_error(p: Point, v: Tensor) -> Tensor:
    """The sample that v predicts, less the true one, (B, …)."""
    x, x0 = at_least_float32(p.x), at_least_float32(required(p.x0, "x0"))
    return (x0_from(x, at_least_float32(v), p.sigma) - x0).double()


def matching(p: Point, v: Tensor) -> Tensor:
    """|v - (eps - x0)|^2, mean over dims, (B,): the loss of flow matching."""
    return mean_dims(v_error(p, v) ** 2)


def size(error: Tensor) -> Tensor:
    """Mean absolute error, (B,), without gradient and never 0: what adaptive losses divide by."""
    return mean_dims(error.detach().abs()).clamp(min=1e-5)


def adaptive(error: Tensor) -> Tensor:
    """error^2 over its own size, mean over dims, (B,): all noise levels weigh alike."""
    return mean_dims(error**2) / size(error)
