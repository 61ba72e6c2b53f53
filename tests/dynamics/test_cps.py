import pytest
import torch

from flowalign.dynamics import CPS, ODE
from flowalign.flow import eps_from, interpolate, velocity


def test_the_reference_steps_are_reproduced(golden, agrees):
    d = golden("dynamics_cps_flux_6_f64")
    for i, eta in enumerate(d["eta"].tolist()):
        dynamics, at = CPS(eta), (d["sigma"][i], d["sigma_next"][i], d["sigmas"][1])
        step = dynamics.step(d["sample"][i], d["v"][i], *at, noise=d["noise"][i])
        assert agrees(step.mean, d["mean"][i], 1e-12)
        assert agrees(step.std.flatten(), d["std_dev_t"][i].expand(2), 1e-12)
        assert agrees(step.x_next, d["prev_sample"][i], 1e-12)
        assert agrees(dynamics.log_prob(step.x_next, step.mean, step.std), d["log_prob"][i], 1e-12)
        mean, std = dynamics.moments(d["sample"][i], d["v_new"][i], *at)
        assert agrees(mean, d["mean_new"][i], 1e-12)
        assert agrees(dynamics.log_prob(d["prev_sample"][i], mean, std), d["log_prob_new"][i], 1e-12)


def test_vanishing_eta_gives_the_ode():
    x, v = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    ode, _ = ODE().moments(x, v, 1.0, 0.5)
    mean, std = CPS(0.0).moments(x, v, 1.0, 0.5)
    torch.testing.assert_close(mean, ode)
    assert not std.any()
    mean, std = CPS(1e-4).moments(x, v, 1.0, 0.5)
    assert 0 < (mean - ode).abs().max() < 1e-7
    assert not CPS(0.0).stochastic


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0, 1.2])
def test_predicted_and_fresh_noise_add_up_to_sigma_next(eta):
    x0, eps = torch.randn(2, 2, 3, dtype=torch.float64)
    x, v = interpolate(x0, eps, 0.8), velocity(x0, eps)
    mean, std = CPS(eta).moments(x, v, 0.8, 0.6)
    kept = (mean - 0.4 * x0) / eps_from(x, v, 0.8)
    torch.testing.assert_close(kept**2 + std**2, torch.full_like(x, 0.36))


@pytest.mark.parametrize("eta", [1.2, 1.8])
def test_beyond_one_the_fresh_noise_falls_as_it_rose(eta: float):
    """Published configs for Qwen-Image have such values."""
    x, v = torch.randn(2, 2, 3, dtype=torch.float64)
    assert CPS(eta).stochastic
    for one, other in zip(CPS(eta).moments(x, v, 0.8, 0.6), CPS(2 - eta).moments(x, v, 0.8, 0.6), strict=True):
        torch.testing.assert_close(one, other)


def test_at_full_eta_all_noise_is_fresh():
    x0, eps = torch.randn(2, 2, 3, dtype=torch.float64)
    mean, std = CPS(1.0).moments(interpolate(x0, eps, 0.8), velocity(x0, eps), 0.8, 0.6)
    torch.testing.assert_close(mean, 0.4 * x0)
    torch.testing.assert_close(std, torch.full_like(std, 0.6))


def test_the_last_step_is_the_predicted_sample_whatever_the_noise():
    x, v, noise = torch.randn(3, 2, 3)
    torch.testing.assert_close(CPS(0.7).step(x, v, 0.3, 0.0, noise=noise).x_next, x - 0.3 * v)


def test_samples_have_the_stated_mean_and_std():
    torch.manual_seed(0)
    x, v = torch.full((20000, 1), 2.0), torch.full((20000, 1), -1.0)
    step = CPS(0.7).step(x, v, 0.7, 0.5)
    std = step.std[0].item()
    assert step.x_next.mean().item() == pytest.approx(step.mean[0].item(), abs=4 * std / 20000**0.5)
    assert step.x_next.std().item() == pytest.approx(std, rel=0.02)


def test_no_gradient_flows_through_the_step_taken():
    x, noise = torch.randn(2, 3, 4)
    v = torch.randn(3, 4, requires_grad=True)
    dynamics = CPS(0.7)
    dynamics.log_prob(*dynamics.step(x, v, 0.6, 0.5, noise=noise)).sum().backward()
    assert v.grad is not None
    assert v.grad.abs().min() > 1e-6


def test_log_prob_and_penalty_are_bare_squares():
    y, mean = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    std = torch.tensor([[0.1]])
    assert CPS().log_prob(y, mean, std).item() == -2.5  # -(1 + 4) / 2
    assert CPS().kl(y, mean, std, 0.5, 0.4).item() == 2.5
    assert CPS().gaussian_kl(y, mean, std).item() == pytest.approx(2.5 / 0.02)


@pytest.mark.parametrize("eta", [-0.1, 2.0, float("nan")])
def test_an_eta_out_of_range_is_refused(eta):
    with pytest.raises(ValueError, match=r"eta in \[0, 2\)"):
        CPS(eta)
