"""How wrong a velocity is at a noised point. All in float64: near sigma = 0 an error and its scale both vanish."""

from torch import Tensor

from flowalign.flow import mean_dims, velocity, x0_from
from flowalign.types import Point, given


def v_error(p: Point, v: Tensor) -> Tensor:
    """v - (eps - x0), (B, …)."""
    return (v - velocity(given(p.x0, "x0"), given(p.eps, "eps"))).double()


def x0_error(p: Point, v: Tensor) -> Tensor:
    """The sample that v predicts, less the true one, (B, …)."""
    return (x0_from(p.x, v, p.sigma) - given(p.x0, "x0")).double()


def matching(p: Point, v: Tensor) -> Tensor:
    """|v - (eps - x0)|^2, mean over dims, (B,): the loss of flow matching."""
    return mean_dims(v_error(p, v) ** 2)


def size(error: Tensor) -> Tensor:
    """Mean absolute error, (B,), without gradient and never 0: what adaptive losses divide by."""
    return mean_dims(error.detach().abs()).clamp(min=1e-5)


def adaptive(error: Tensor) -> Tensor:
    """error^2 over its own size, mean over dims, (B,): all noise levels weigh alike."""
    return mean_dims(error**2) / size(error)
