import pytest
import torch

from flowalign.dynamics import ODE, FlowSDE
from flowalign.flow import mean_dims


def test_the_reference_steps_are_reproduced(golden, agrees):
    d = golden("dynamics_flow_sde_flux_6_f64")
    for i, eta in enumerate(d["eta"].tolist()):
        dynamics, at = FlowSDE(eta), (d["sigma"][i], d["sigma_next"][i], d["sigmas"][1])
        step = dynamics.step(d["sample"][i], d["v"][i], *at, noise=d["noise"][i])
        assert agrees(step.mean, d["mean"][i], 1e-12)
        assert agrees(step.std.flatten(), (d["std_dev_t"][i] * d["sqrt_neg_dt"][i]).expand(2), 1e-12)
        assert agrees(step.x_next, d["prev_sample"][i], 1e-12)
        assert agrees(dynamics.log_prob(step.x_next, step.mean, step.std), d["log_prob"][i], 1e-12)
        mean, std = dynamics.moments(d["sample"][i], d["v_new"][i], *at)
        assert agrees(dynamics.log_prob(d["prev_sample"][i], mean, std), d["log_prob_new"][i], 1e-12)


def test_one_step_by_hand():
    # sigma = 1/2 makes the noise rate eta = 1: mean = x (1 - 1/4) - v (1 + 1/2) / 4, variance = -dt = 1/4.
    mean, std = FlowSDE(1.0).moments(torch.tensor([[4.0]]), torch.tensor([[2.0]]), 0.5, 0.25)
    assert mean.item() == pytest.approx(4 * 0.75 - 2 * 1.5 * 0.25)
    assert std.item() == pytest.approx(0.5)


def test_vanishing_eta_gives_the_ode():
    x, v = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    ode, _ = ODE().moments(x, v, 0.6, 0.5)
    mean, std = FlowSDE(0.0).moments(x, v, 0.6, 0.5)
    assert torch.equal(mean, ode)
    assert not std.any()
    mean, std = FlowSDE(1e-4).moments(x, v, 0.6, 0.5)
    assert 0 < (mean - ode).abs().max() < 1e-7
    assert 0 < std.max() < 1e-4
    assert not FlowSDE(0.0).stochastic


def test_the_marginal_of_a_gaussian_is_preserved_as_steps_shrink():
    # Data N(0, 1): x_sigma has variance (1 - sigma)^2 + sigma^2, and v = E[eps - x0 | x] is linear in x.
    sigma, sigma_next = 0.5, 0.499
    var, var_next = (s * s + (1 - s) ** 2 for s in (sigma, sigma_next))
    gain = torch.tensor([[(2 * sigma - 1) / var]], dtype=torch.float64)
    mean, std = FlowSDE(0.7).moments(torch.ones_like(gain), gain, sigma, sigma_next)
    noise_added = std.item() ** 2
    assert mean.item() ** 2 * var + noise_added == pytest.approx(var_next, abs=2e-3 * noise_added + 2e-6)


def test_log_prob_is_the_mean_log_density_of_a_normal():
    x, v, noise = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    dynamics = FlowSDE(0.7)
    step = dynamics.step(x, v, 0.6, 0.5, noise=noise)
    density = torch.distributions.Normal(step.mean, step.std).log_prob(step.x_next)
    torch.testing.assert_close(dynamics.log_prob(*step), mean_dims(density), rtol=0, atol=1e-7)


def test_samples_have_the_stated_mean_and_std():
    torch.manual_seed(0)
    x, v = torch.full((20000, 1), 2.0), torch.full((20000, 1), -1.0)
    step = FlowSDE(0.9).step(x, v, 0.7, 0.5)
    std = step.std[0].item()
    assert step.x_next.mean().item() == pytest.approx(step.mean[0].item(), abs=4 * std / 20000**0.5)
    assert step.x_next.std().item() == pytest.approx(std, rel=0.02)


def test_no_gradient_flows_through_the_step_taken():
    x, noise = torch.randn(2, 3, 4)
    v = torch.randn(3, 4, requires_grad=True)
    dynamics = FlowSDE(0.7)
    dynamics.log_prob(*dynamics.step(x, v, 0.6, 0.5, noise=noise)).sum().backward()
    # Were x_next not held fixed, x_next - mean = std * noise would not depend on v at all.
    assert v.grad is not None
    assert v.grad.abs().min() > 1e-6


def test_sigma_max_acts_at_one_only():
    x, v = torch.randn(2, 2, 3)
    sigma, sigma_next = torch.tensor([1.0, 0.8]), torch.tensor([0.9, 0.7])
    mean, std = FlowSDE(0.7).moments(x, v, sigma, sigma_next, 0.9)
    alone, alone_std = FlowSDE(0.7).moments(x[1:], v[1:], 0.8, 0.7)
    assert torch.equal(mean[1:], alone)
    assert torch.equal(std[1:], alone_std)
    assert std[0].item() == pytest.approx(0.7 * (1 / 0.1) ** 0.5 * 0.1**0.5)


@pytest.mark.parametrize("sigma", [1.0, torch.tensor(1.0), torch.tensor([0.5, 1.0])])
def test_sigma_one_without_sigma_max_is_refused(sigma):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="pass sigma_max"):
        FlowSDE().moments(x, x, sigma, 0.4)


def test_half_precision_inputs_give_float32_moments():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    assert {t.dtype for t in FlowSDE().step(x, x, 0.6, 0.5)} == {torch.float32}


def test_the_two_penalties_differ_by_the_step_size():
    mean, ref = torch.randn(2, 3, 4, dtype=torch.float64)
    sigma, sigma_next = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.8, 0.1, 0.1])
    dynamics = FlowSDE(0.7)
    _, std = dynamics.moments(mean, ref, sigma, sigma_next)
    ratio = dynamics.kl(mean, ref, std, sigma, sigma_next) / dynamics.gaussian_kl(mean, ref, std)
    torch.testing.assert_close(ratio, (sigma - sigma_next).double(), rtol=1e-6, atol=0)


def test_gaussian_kl_is_the_divergence_of_two_normals():
    mean, ref = torch.randn(2, 3, 4, dtype=torch.float64)
    std = torch.tensor([[0.1], [1.0], [3.0]], dtype=torch.float64)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, std), normal(ref, std))
    torch.testing.assert_close(FlowSDE().gaussian_kl(mean, ref, std), mean_dims(exact))


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf")])
def test_an_impossible_eta_is_refused(eta):
    with pytest.raises(ValueError, match="FlowSDE needs a finite eta"):
        FlowSDE(eta)
