"""ODE solvers of the flow, for rollouts and evaluation: one network evaluation per step."""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from flowalign.flow import at_least_float32, expand, x0_from


class Solver(Protocol):
    """A solver without state. The history between steps is in the SolverState of one trajectory."""

    def start(self) -> "SolverState":
        """The state of a new trajectory."""
        ...


class SolverState(Protocol):
    """A solver's history along one trajectory."""

    def step(
        self, x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, last: bool, careful: bool = False
    ) -> Tensor:
        """The state at sigma_next, (B, …). last: whether this is the final step of the schedule. careful: whether it is
        the step before, in a schedule of fewer than 15 steps."""
        ...

    def push(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> None:
        """Add the prediction of a step that the solver does not take itself."""
        ...


class Euler:
    """x + (sigma_next - sigma) v: first order, without history. DDIM is the same step on a straight path."""

    def start(self) -> "Euler":
        """Itself, since it has no history."""
        return self

    def push(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> None:
        """Does nothing, since it has no history."""

    def step(
        self, x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, last: bool, careful: bool = False
    ) -> Tensor:
        """One Euler step."""
        del last, careful
        x, v = at_least_float32(x), at_least_float32(v)
        return x + (expand(sigma_next, x) - expand(sigma, x)) * v


Rule = Literal["midpoint", "heun"]


@dataclass(frozen=True)
class DPM:
    """Multistep DPM-Solver++ (arXiv:2211.01095), as used for sampling by DiffusionNFT and MixGRPO-Flash.

    The order rises from 1 to `order` as the history grows. It is 1 on the last step, and at most 2 on the one before in
    schedules of fewer than 15 steps. rule: the weight of the last difference in a second-order step.
    """

    order: Literal[1, 2, 3] = 2
    rule: Rule = "midpoint"

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"DPM-Solver++ has order 1, 2 or 3 (got {self.order}).")
        if self.rule not in get_args(Rule):
            raise ValueError(f"a second-order step follows the rule {' or '.join(get_args(Rule))} (got {self.rule!r}).")

    def start(self) -> "DPMState":
        """A state with an empty history."""
        return DPMState(self.order, self.rule)


DPM2 = DPM
"""Former name, which configs in older checkpoints use."""


class DPMState:
    """The predicted clean samples of the last `order` steps, with their sigmas in float64."""

    def __init__(self, order: int, rule: Rule) -> None:
        self.order, self.rule = order, rule
        self.history: list[tuple[Tensor, Tensor]] = []

    def push(self, x: Tensor, v: Tensor, sigma: float | Tensor) -> None:
        """Add the prediction made at (x, sigma). Called directly for a step that the solver does not take itself."""
        x, v = at_least_float32(x), at_least_float32(v)
        self.history = [(x0_from(x, v, sigma), expand(sigma, x).double()), *self.history[: self.order - 1]]

    def step(
        self, x: Tensor, v: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, last: bool, careful: bool = False
    ) -> Tensor:
        """x' = s'/s x + α (-b m + c1 D1 - c2 D2), with the prediction m and its first and second differences D1, D2."""
        self.push(x, v, sigma)
        (m, s), *before = self.history
        s_next = expand(sigma_next, m).double()
        here, h = _log_snr(s), _log_snr(s_next) - _log_snr(s)
        b, alpha = (-h).expm1(), 1 - s_next
        x = (s_next / s).to(m.dtype) * x - (alpha * b).to(m.dtype) * m
        order = 1 if last else min(1 + len(before), 2 if careful else self.order)
        if order == 1:
            return x
        (m1, s1), *rest = before
        # Zero if the previous step began at sigma = 1, where the log-SNR is infinite.
        r = (h / (here - _log_snr(s1))).to(m.dtype)
        D1 = r * (m - m1)
        if order == 2:
            weight = -0.5 * b if self.rule == "midpoint" else b / h + 1
            return x + (alpha * weight).to(m.dtype) * D1
        m2, s2 = rest[0]
        slope = D1 - (h / (_log_snr(s1) - _log_snr(s2))).to(m.dtype) * (m1 - m2)
        reach = h / (here - _log_snr(s2))  # 1 / (r0 + r1) of the paper
        D1 = D1 + (reach * (here - _log_snr(s1)) / h).to(m.dtype) * slope
        first, second = alpha * (b / h + 1), alpha * ((b + h) / h**2 - 0.5)
        return x + first.to(m.dtype) * D1 - (second * reach).to(m.dtype) * slope


def _log_snr(s: Tensor) -> Tensor:
    return (1 - s).log() - s.log()
