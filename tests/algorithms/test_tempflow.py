import pytest
import torch

from flowalign.algorithms import GRPO, TempFlow
from flowalign.dynamics import CPS, FlowSDE


def test_the_reference_loss_and_gradient_are_reproduced(golden_transition, agrees, precision):
    cast, tolerance = precision
    d, p = golden_transition("tempflow_0_f64")
    algorithm = TempFlow(FlowSDE(d["eta"].item()), d["clip_range"].item(), kl_beta=d["beta"].item(), scale=2.25)
    v = cast(d["v_new"]).requires_grad_()
    loss, metrics = algorithm.loss(cast(p), v)
    loss.mean().backward()
    _, std = algorithm._moments(cast(p), v)
    assert agrees(algorithm.weight(p, std)[0], d["weight"], tolerance)
    assert agrees(metrics["kl"].mean(), d["kl_loss"], tolerance)
    assert agrees(loss.mean(), d["loss"], tolerance)
    assert agrees(v.grad, d["grad_v"], tolerance)


def test_the_constants_of_the_code_are_mean_weights_of_one():
    u = torch.linspace(1, 3e-3 / (1 + 2e-3), 10, dtype=torch.float64)
    sigmas = torch.cat([3 * u / (1 + 2 * u), torch.zeros(1, dtype=torch.float64)])  # SD3.5, ten steps
    x = torch.zeros(9, 1, dtype=torch.float64)
    _, std = FlowSDE(0.7).moments(x, x, sigmas[:9], sigmas[1:10], sigmas[1])
    assert 1 / std.mean().item() == pytest.approx(2.25, abs=0.01)


def test_with_equal_stds_it_is_grpo(transition):
    dynamics = CPS(0.7)  # whose std is sigma_next sin(…)
    p, v = transition([1.0, -1.0, 2.0], dynamics)
    p.sigma_next = torch.full_like(p.sigma, 0.2)
    _, std = dynamics.moments(p.x, v, p.sigma, p.sigma_next)
    p.std_scale = std.flatten().mean().expand(3)
    moved = (v + 0.01).detach()
    kl = {"kl_beta": 0.1, "kl": "gaussian"}
    torch.testing.assert_close(TempFlow(dynamics, **kl).loss(p, moved), GRPO(dynamics, **kl).loss(p, moved))


def test_steps_weigh_by_their_noise(transition):
    p, v = transition([1.0, 1.0])
    _, std = FlowSDE(0.7).moments(p.x, v, p.sigma, p.sigma_next, p.sigma_max)
    p.std_scale = std.mean().expand(2)
    loss, _ = TempFlow(FlowSDE(0.7)).loss(p, v)
    assert loss.mean().item() == pytest.approx(-1)
    torch.testing.assert_close(loss[0] / loss[1], std[0, 0, 0] / std[1, 0, 0])


def test_the_normaliser_is_asked_for_by_name(transition):
    p, v = transition([1.0])
    with pytest.raises(ValueError, match="std_scale"):
        TempFlow(FlowSDE(0.7)).loss(p, v)
    with pytest.raises(ValueError, match="scale"):
        TempFlow(FlowSDE(0.7), scale=-1.0)
