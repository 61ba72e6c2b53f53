"""Deterministic solvers of the flow, for rollouts and evaluation: one network call per step."""

from typing import Literal, Protocol

from torch import Tensor

from flowalign.flow import at_least_float32, expand, x0_from


class Solver(Protocol):
    """A method; what it remembers between steps lives in the state of one walk."""

    def start(self) -> "SolverState":
        """A fresh walk."""
        ...


class SolverState(Protocol):
    """One walk."""

    def step(self, x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, last: bool) -> Tensor:
        """The state at sigma_next, (B, …); `last` on the final step of the schedule."""
        ...

    def push(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> None:
        """Remember the prediction of a step that was taken by other means."""
        ...


class Euler:
    """x + (sigma_next - sigma) v: first order, without memory. DDIM is the same step on a straight path."""

    def start(self) -> "Euler":
        """Itself: there is nothing to remember."""
        return self

    def push(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> None:
        """Nothing to remember."""

    def step(self, x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, last: bool) -> Tensor:
        """One Euler step."""
        del last
        x, v = at_least_float32(x), at_least_float32(v)
        return x + (expand(sigma_next, x) - expand(sigma, x)) * v


class DPM2:
    """DPM-Solver++(2M), arXiv:2211.01095, as DiffusionNFT samples with it: orders 1, 2, …, 2, 1, or 1 throughout."""

    def __init__(self, order: Literal[1, 2] = 2) -> None:
        if order not in (1, 2):
            raise ValueError(f"DPM2 has order 1 or 2 (got {order}).")
        self.order = order

    def start(self) -> "DPM2State":
        """A walk with an empty history."""
        return DPM2State(self.order)


class DPM2State:
    """The predicted clean samples of the last two steps, with their sigmas in float64."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.history: list[tuple[Tensor, Tensor]] = []

    def push(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> None:
        """Remember the prediction made at (x, sigma); on its own for a step that was taken by other means."""
        x, v = at_least_float32(x), at_least_float32(v)
        self.history = [*self.history[-1:], (x0_from(x, v, sigma), expand(sigma, x).double())]

    def step(self, x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, last: bool) -> Tensor:
        """First order on the first and the last step, the two-step midpoint rule between them."""
        self.push(x, v, sigma)
        m, s = self.history[-1]
        s_next = expand(sigma_next, m).double()
        h = _log_snr(s_next) - _log_snr(s)
        a, b = (s_next / s).to(m.dtype), ((1 - s_next) * (-h).expm1()).to(m.dtype)
        first = a * x - b * m
        if self.order == 1 or last or len(self.history) < 2:
            return first
        m_prev, s_prev = self.history[0]
        # Zero where the previous step began at sigma = 1, which is infinitely far away on this axis.
        inverse_r = (h / (_log_snr(s) - _log_snr(s_prev))).to(m.dtype)
        return first - 0.5 * b * (inverse_r * (m - m_prev))


def _log_snr(s: Tensor) -> Tensor:
    return (1 - s).log() - s.log()
