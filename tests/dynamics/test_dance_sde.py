import pytest
import torch

from flowalign.dynamics import ODE, DanceSDE, FlowSDE
from flowalign.flow import mean_dims, x0_from


def test_the_reference_steps_are_reproduced(golden, agrees):
    d = golden("dynamics_dance_sde_f64")
    for i, eta in enumerate(d["eta"].tolist()):
        k = int(d["step_index"][i])
        dynamics, at = DanceSDE(eta), (d["sigmas"][k], d["sigmas"][k + 1])
        step = dynamics.step(d["sample"][i], d["v"][i], *at, noise=d["noise"][i])
        assert agrees(x0_from(d["sample"][i], d["v"][i], at[0]), d["pred_x0"][i], 1e-12)
        assert agrees(step.mean, d["mean"][i], 1e-12)
        assert agrees(step.std.flatten(), d["std"][i].expand(2), 1e-12)
        assert agrees(step.x_next, d["prev_sample"][i], 1e-12)
        assert agrees(dynamics.log_prob(*step), d["log_prob"][i], 1e-12)
        mean, std = dynamics.moments(d["sample"][i], d["v_new"][i], *at)
        assert agrees(mean, d["mean_new"][i], 1e-12)
        assert agrees(dynamics.log_prob(d["prev_sample"][i], mean, std), d["log_prob_new"][i], 1e-12)
        # Copies of the method without the two constants have another density, but the same ratio.
        ratio = (d["log_prob_mixgrpo_new"][i] - d["log_prob_mixgrpo"][i]).exp()
        ours = (dynamics.log_prob(d["prev_sample"][i], mean, std) - dynamics.log_prob(*step)).exp()
        assert agrees(ours, ratio, 1e-9)


def test_one_step_by_hand():
    # eta = 1 at sigma = 1/2: eps_hat = 4 + 2 / 2 = 5, drift 2 + 5 / (2 · 1/2) = 7 over dt = -1/4.
    mean, std = DanceSDE(1.0).moments(torch.tensor([[4.0]]), torch.tensor([[2.0]]), 0.5, 0.25)
    assert mean.item() == pytest.approx(4 - 7 / 4)
    assert std.item() == pytest.approx(0.5)


def test_it_is_flow_sde_where_the_noise_rates_meet():
    x, v = torch.randn(2, 3, 4, dtype=torch.float64)
    ours, theirs = DanceSDE(0.7).moments(x, v, 0.5, 0.4), FlowSDE(0.7).moments(x, v, 0.5, 0.4)
    torch.testing.assert_close(ours, theirs)  # sigma / (1 - sigma) is 1 at a half


def test_vanishing_eta_gives_the_ode():
    x, v = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    ode, _ = ODE().moments(x, v, 1.0, 0.5)
    mean, std = DanceSDE(0.0).moments(x, v, 1.0, 0.5)
    assert torch.equal(mean, ode)
    assert not std.any()
    mean, std = DanceSDE(1e-4).moments(x, v, 1.0, 0.5)
    assert 0 < (mean - ode).abs().max() < 1e-7
    assert 0 < std.max() < 1e-4
    assert not DanceSDE(0.0).stochastic


def test_log_prob_is_the_mean_log_density_of_a_normal():
    x, v, noise = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    step = DanceSDE(0.3).step(x, v, 0.6, 0.5, noise=noise)
    density = torch.distributions.Normal(step.mean, step.std).log_prob(step.x_next)
    torch.testing.assert_close(DanceSDE(0.3).log_prob(*step), mean_dims(density), rtol=0, atol=1e-7)


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_an_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match="DanceSDE needs a finite eta"):
        DanceSDE(eta)
