import pytest
import torch

from flowalign.dynamics import ODE


def test_euler_by_hand():
    x, v = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    step = ODE().step(x, v, 0.75, 0.25)
    assert step.x_next.item() == 2.0  # 3 - 0.5 * 2
    assert step.std.item() == 0


def test_the_true_velocity_arrives_at_the_sample_in_one_step():
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(ODE().step(eps, eps - x0, 1.0, 0.0).x_next, x0)


def test_noise_is_ignored():
    x, v = torch.randn(2, 3, 4)
    assert torch.equal(ODE().step(x, v, 0.5, 0.4, noise=torch.randn(3, 4)).x_next, ODE().step(x, v, 0.5, 0.4).x_next)


def test_a_deterministic_step_has_no_density():
    assert not ODE.stochastic
    x = torch.zeros(1, 2)
    with pytest.raises(TypeError, match="no density"):
        ODE().log_prob(x, x, x)
