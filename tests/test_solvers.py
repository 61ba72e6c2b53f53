from typing import Literal

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from flowalign.dynamics import ODE
from flowalign.solvers import DPM, Euler, Rule, Solver


def walk(solver: Solver, velocity, x, sigmas):
    state, steps = solver.start(), len(sigmas) - 1
    for i in range(steps):
        x = state.step(x, velocity(x, sigmas[i]), sigmas[i], sigmas[i + 1], last=i == steps - 1)
    return x


def gaussian_velocity(x, s):
    """E[eps - x0 | x] for data N(0, 1/4)."""
    return x * (s - (1 - s) / 4) / (s * s + (1 - s) ** 2 / 4)


def deviation(s: float) -> float:
    """Standard deviation of x at s, for the same data."""
    return (s * s + (1 - s) ** 2 / 4) ** 0.5


def error(solver: Solver, steps: int, start: float = 0.8, end: float = 0.2) -> float:
    # The flow of a Gaussian scales x by the ratio of standard deviations. The ends are infinitely far apart in log-SNR,
    # where the order of convergence means nothing, hence the range inside of them.
    sigmas = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    x = walk(solver, gaussian_velocity, torch.ones(1, 1, dtype=torch.float64), sigmas)
    return abs(x.item() - deviation(end) / deviation(start))


def test_the_reference_rollout_is_reproduced(golden, agrees):
    d = golden("solver_nft_dpm2_sd3_10_f32")
    state, x = DPM().start(), d["latents"][0]
    for i in range(10):
        x = state.step(x, d["v"][i], d["sigmas"][i], d["sigmas"][i + 1], last=i == 9)
        assert agrees(x, d["latents"][i + 1], 1e-6)


def test_the_reference_rollout_is_reproduced_with_its_network(golden, agrees):
    d = golden("solver_nft_dpm2_sd3_10_f32")

    def network(x, s):
        return torch.einsum("bchw,cd->bdhw", x.tanh(), d["W"]) + d["b"][:, None, None] * s

    assert agrees(walk(DPM(), network, d["latents"][0], d["sigmas"]), d["latents"][-1], 1e-6)


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (DPM(order=1), 1), (DPM(), 2)])
def test_halving_the_steps_shrinks_the_error_by_the_order(solver, order):
    ratio = error(solver, 40) / error(solver, 80)
    assert 2**order * 0.9 < ratio < 2**order * 1.2


def test_second_order_beats_first_order_at_ten_steps():
    assert error(DPM(), 10, 1.0, 0.0) < error(Euler(), 10, 1.0, 0.0) / 2


def test_euler_is_the_step_of_the_ode_and_first_order_dpm_equals_both():
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)
    for sigma, sigma_next in ((1.0, 0.8), (0.8, 0.3), (0.3, 0.0), (1.0, 0.0)):
        ode = ODE().step(x, v, sigma, sigma_next).x_next
        assert torch.equal(Euler().start().step(x, v, sigma, sigma_next, last=False), ode)
        torch.testing.assert_close(DPM(order=1).start().step(x, v, sigma, sigma_next, last=False), ode)


@pytest.mark.parametrize("solver", [Euler(), DPM(order=1), DPM(), DPM(rule="heun"), DPM(3)])
def test_a_straight_flow_is_solved_exactly(solver):
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(walk(solver, lambda x, s: eps - x0, eps, sigmas), x0)


def test_two_walks_of_one_solver_do_not_share_a_history():
    solver, (x, v) = DPM(), torch.randn(2, 3, 4)
    fresh = DPM().start().step(x, v, 0.6, 0.5, last=False)
    solver.start().step(x, -v, 0.8, 0.6, last=False)
    assert torch.equal(solver.start().step(x, v, 0.6, 0.5, last=False), fresh)


def test_a_remembered_prediction_makes_the_next_step_second_order():
    x, v = torch.randn(2, 3, 4)
    state = DPM().start()
    state.push(x, -v, 0.8)
    walked = DPM().start()
    walked.step(x, -v, 0.8, 0.6, last=False)
    assert torch.equal(state.step(x, v, 0.6, 0.5, last=False), walked.step(x, v, 0.6, 0.5, last=False))


def test_float32_in_float32_out():
    x, v = torch.randn(2, 3, 4)
    state = DPM().start()
    assert state.step(x, v, 0.8, 0.6, last=False).dtype == torch.float32
    assert state.step(x, v, 0.6, 0.5, last=False).dtype == torch.float32


@pytest.mark.parametrize("steps", [6, 14, 15, 20])
@pytest.mark.parametrize(("order", "rule"), [(2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")])
def test_every_order_and_rule_is_that_of_diffusers(order: Literal[2, 3], rule: Rule, steps: int):
    """Its multistep scheduler on the same sigmas; the order falls near the end where there are fewer than 15 steps."""
    theirs = DPMSolverMultistepScheduler(
        solver_order=order, solver_type=rule, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    theirs.set_timesteps(steps)
    sigmas, state = theirs.sigmas.double(), DPM(order, rule).start()
    x = expected = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(steps):
        v = torch.tanh(x) * (1 + sigmas[i])
        x = state.step(x, v, sigmas[i], sigmas[i + 1], last=i == steps - 1, careful=i == steps - 2 and steps < 15)
        v = torch.tanh(expected) * (1 + sigmas[i])
        expected = theirs.step(v, theirs.timesteps[i], expected, return_dict=False)[0]
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)  # it keeps its coefficients in float32


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order 1, 2 or 3"):
        DPM(order=4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="midpoint or heun"):
        DPM(rule="euler")  # pyright: ignore[reportArgumentType]
