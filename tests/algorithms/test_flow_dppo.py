import pytest
import torch

from flowalign.algorithms import GRPO, FlowDPPO
from flowalign.dynamics import CPS, FlowSDE


def test_on_policy_it_is_grpo(transition, gradient):
    p, v = transition([1.0, -1.0, 2.0, 0.5])
    torch.testing.assert_close(FlowDPPO(FlowSDE(0.7)).loss(p, v), GRPO(FlowSDE(0.7)).loss(p, v))
    torch.testing.assert_close(gradient(FlowDPPO(FlowSDE(0.7)), p, v), gradient(GRPO(FlowSDE(0.7)), p, v))


@pytest.mark.parametrize("dynamics", [FlowSDE(0.7), CPS(0.7)])
@pytest.mark.parametrize("along", [1, -1])
def test_only_a_far_step_that_goes_on_is_stopped(transition, gradient, dynamics, along):
    p, v = transition([1.0, -1.0, 1.0, -1.0], dynamics)
    ascent = -gradient(GRPO(dynamics), p, v)  # where the advantages point
    moved = (v + along * 0.01 * ascent / ascent.abs().amax(dim=(1, 2), keepdim=True)).detach().requires_grad_()
    mean, std = dynamics.moments(p.x, moved, p.sigma, p.sigma_next, p.sigma_max)
    divergence = dynamics.gaussian_kl(mean, p.mean, std)
    threshold = divergence.detach().sort().values[1:3].mean().item()
    loss, metrics = FlowDPPO(dynamics, threshold).loss(p, moved)
    outside = (divergence > threshold) if along == 1 else torch.zeros(4, dtype=torch.bool)
    assert metrics["clip_fraction"].tolist() == outside.tolist()
    alive = torch.autograd.grad(loss.sum(), moved)[0].flatten(1).any(dim=1)
    assert alive.tolist() == (~outside).tolist()


def test_an_impossible_threshold_is_refused():
    with pytest.raises(ValueError, match="threshold"):
        FlowDPPO(FlowSDE(0.7), threshold=0.0)
    assert FlowDPPO.keeps_mean
