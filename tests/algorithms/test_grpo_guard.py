import pytest
import torch

from flowalign.algorithms import GRPO, GRPOGuard
from flowalign.dynamics import CPS, DanceSDE, FlowSDE
from flowalign.flow import mean_dims


def test_the_official_loss_and_gradient_are_reproduced_by_parity(golden_transition, agrees, precision):
    cast, tolerance = precision
    d, p = golden_transition("guard_official_0_f64")
    algorithm = GRPOGuard(FlowSDE(d["eta"].item()), d["clip_range"].item(), kl_beta=d["beta"].item(), parity=True)
    v = cast(d["v_new"]).requires_grad_()
    loss, metrics = algorithm.loss(cast(p), v)
    loss.mean().backward()
    assert agrees(metrics["ratio"], d["ratio"], tolerance)
    assert agrees(loss.mean(), d["loss"], tolerance)
    assert agrees(v.grad, d["grad_v"], tolerance)


def test_the_intended_loss_and_gradient_are_reproduced(golden_transition, agrees, precision):
    cast, tolerance = precision
    d, p = golden_transition("guard_variants_0_f64")
    v = cast(d["v_new"]).requires_grad_()
    loss, metrics = GRPOGuard(FlowSDE(d["eta"].item()), d["clip_range"].item()).loss(cast(p), v)
    loss.mean().backward()
    assert agrees(metrics["ratio"], d["ff_ratio"][:, 0, 0].diagonal(), tolerance)  # the same ratio, without 1 / -dt
    assert agrees(loss.mean(), d["verl_policy_loss"], tolerance)
    assert agrees(v.grad, d["verl_grad_v"], tolerance)


def test_without_shift_scale_and_weight_it_is_grpo(transition):
    class Plain(GRPOGuard):
        def log_ratio(self, p, mean, std):
            p.mean = mean.detach()  # no shift of the mean …
            unit = torch.ones_like(std)  # … and unit scale
            return super().log_ratio(p, mean, std) / std.flatten() * unit.flatten()

        def weight(self, p, std):
            return super().weight(p, std) * (p.sigma - p.sigma_next)

    p, v = transition([1.0, -1.0, 2.0, 0.5])
    moved = (v + 0.01).detach()
    ours, theirs = Plain(FlowSDE(0.7), clip=1e-3).loss(p, moved), GRPO(FlowSDE(0.7), clip=1e-3).loss(p, moved)
    torch.testing.assert_close(ours, theirs)


def test_the_log_ratio_is_the_shift_of_the_mean_seen_along_the_noise(transition):
    p, v = transition([1.0, -1.0, 2.0, 0.5])
    dynamics, algorithm = FlowSDE(0.7), GRPOGuard(FlowSDE(0.7))
    mean, std = dynamics.moments(p.x, v + 0.1, p.sigma, p.sigma_next, p.sigma_max)
    z = (p.x_next - p.mean) / std
    torch.testing.assert_close(algorithm.log_ratio(p, mean, std), mean_dims(z * (mean - p.mean)))


def test_ratio_is_one_on_policy_and_the_loss_is_over_the_step(transition):
    p, v = transition([1.0, -1.0, 2.0, 0.5])
    loss, metrics = GRPOGuard(FlowSDE(0.7)).loss(p, v)
    assert metrics["ratio"].tolist() == [1.0] * 4
    torch.testing.assert_close(loss, -p.advantage / 0.1)  # every step of these points has -dt = 0.1


def test_rows_are_apart_except_for_parity(transition, gradient):
    p, v = transition([1.0, -1.0])
    both = gradient(GRPOGuard(FlowSDE(0.7), clip=1.0), p, (v + 0.1).detach().requires_grad_())
    alone = gradient(GRPOGuard(FlowSDE(0.7), clip=1.0), p.index(slice(1)), (v[:1] + 0.1).detach().requires_grad_())
    assert torch.equal(both[:1], alone)
    coupled = gradient(GRPOGuard(FlowSDE(0.7), clip=1.0, parity=True), p, (v + 0.1).detach().requires_grad_())
    assert (coupled - both).abs().max() > 1e-6


@pytest.mark.parametrize("dynamics", [CPS(0.7), DanceSDE(0.3)])
def test_other_dynamics_are_refused(dynamics):
    with pytest.raises(ValueError, match=f"FlowSDE only .got {type(dynamics).__name__}"):
        GRPOGuard(dynamics)


def test_it_keeps_what_it_needs():
    assert GRPOGuard.keeps_mean
    assert GRPOGuard.dynamics_only == ("FlowSDE",)
    assert GRPOGuard(FlowSDE(0.7)).frozen == ()
