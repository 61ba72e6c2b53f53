"""What a walk does to the marginals of a flow that is known exactly: data N(MEAN, spread^2), one dim.

x_sigma has mean (1 - sigma) MEAN and variance (1 - sigma)^2 spread^2 + sigma^2, and the best velocity is affine in x.
So is a step then, and the mean and variance of a whole walk follow from its coefficients, without drawing a number.
"""

import math

import pytest
import torch
from torch import Tensor

from flowalign.dynamics import CPS, ODE, DanceSDE, Dynamics, FlowSDE

MEAN = 1.5


def moments_after(dynamics: Dynamics, sigmas: Tensor, spread: float) -> tuple[float, float]:
    """Errors of mean and variance at the end of the walk, started at the exact ones."""
    s, s_next = sigmas[:-1].repeat(2), sigmas[1:].repeat(2)
    x = torch.arange(2, dtype=torch.float64).repeat_interleave(len(sigmas) - 1)  # probes for intercept and slope
    mu, total = exact(s, spread)
    eps_hat, x0_hat = s * (x - mu) / total, MEAN + (1 - s) * spread**2 * (x - mu) / total
    next_mean, std = dynamics.moments(x[:, None], (eps_hat - x0_hat)[:, None], s, s_next, sigmas[1])
    intercept, at_one = next_mean.flatten().chunk(2)
    mean, var = (m.item() for m in exact(sigmas[0], spread))
    for a, b, c in zip((at_one - intercept).tolist(), intercept.tolist(), std.flatten().tolist(), strict=False):
        mean, var = a * mean + b, a**2 * var + c**2
    wanted_mean, wanted_var = exact(sigmas[-1], spread)
    return mean - wanted_mean.item(), var - wanted_var.item()


def exact(sigma: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * spread**2 + sigma**2


def error(dynamics: Dynamics, steps: int, start: float, spread: float = 1.0) -> float:
    """Error of the variance of the finished samples."""
    return moments_after(dynamics, torch.linspace(start, 0, steps + 1, dtype=torch.float64), spread)[1]


def order(dynamics: Dynamics, start: float, steps: int) -> float:
    """p in error ~ steps^-p, between `steps` and four times as many."""
    return math.log(abs(error(dynamics, steps, start) / error(dynamics, 4 * steps, start)), 4)


@pytest.mark.parametrize("dynamics", [ODE(), FlowSDE(0.7), DanceSDE(0.3), CPS(0.5), CPS(1.0)])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_mean_is_exact_at_any_number_of_steps(dynamics, steps):
    sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
    assert moments_after(dynamics, sigmas, 0.7)[0] == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_cps_keeps_the_variance_of_the_path_at_any_number_of_steps(eta, steps):
    # A single sample as data: prediction and truth agree, and the coefficients of the path are what is preserved.
    sigmas = torch.linspace(1, 0.05, steps + 1, dtype=torch.float64)
    assert moments_after(CPS(eta), sigmas, 0.0)[1] == pytest.approx(0, abs=1e-13)


def test_cps_narrows_data_with_a_spread_however_many_steps():
    # It replaces the same share of the noise in every step, while x0 is only known on average: see docs/dynamics.md.
    assert [error(CPS(0.5), steps, 1.0) for steps in (40, 160, 640)] == pytest.approx([-0.20, -0.16, -0.15], abs=0.01)
    assert abs(error(CPS(0.5), 640, 1.0)) > 30 * abs(error(ODE(), 640, 1.0))


@pytest.mark.parametrize("dynamics", [ODE(), FlowSDE(0.7), FlowSDE(0.9), FlowSDE(1.2), DanceSDE(0.3), DanceSDE(0.7)])
def test_an_sde_keeps_the_variance_with_order_one(dynamics):
    assert order(dynamics, 0.95, 320) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("eta", [0.7, 0.9])
def test_flow_sde_started_at_pure_noise_has_order_eta_squared(eta):
    # Its first step has the noise of a finite one, whatever its length; what follows forgets that at this rate.
    assert order(FlowSDE(eta), 1.0, 40000) == pytest.approx(eta**2, abs=0.1)


@pytest.mark.parametrize("dynamics", [FlowSDE, DanceSDE, CPS])
def test_a_walk_with_vanishing_noise_is_that_of_the_ode(dynamics):
    gap = [abs(error(dynamics(eta), 10, 0.95) - error(ODE(), 10, 0.95)) for eta in (1e-2, 1e-3)]
    assert gap[1] == pytest.approx(gap[0] / 100, rel=0.1)  # the noise enters by its square
    assert dynamics(0.0).stochastic is False
    assert error(dynamics(0.0), 10, 0.95) == pytest.approx(error(ODE(), 10, 0.95), abs=1e-14)
