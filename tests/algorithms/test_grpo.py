import math

import pytest
import torch
from torch import Tensor

from flowalign.algorithms import GRPO
from flowalign.algorithms.base import pessimistic
from flowalign.dynamics import CPS, ODE, Dynamics, FlowSDE
from flowalign.types import Point

DYNAMICS = [FlowSDE(0.7), CPS(0.7)]
SD3_SECOND_SIGMA = 0.9601293206214905


def on_policy(dynamics: Dynamics, advantage: list[float]) -> tuple[Point, Tensor]:
    """A transition drawn under v, recorded with its log-density, and v itself as a leaf."""
    torch.manual_seed(0)
    batch = len(advantage)
    x, v, noise, ref = torch.randn(4, batch, 4, 6, dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=torch.float64)[:batch]
    sigma_next, sigma_max = sigma - 0.1, torch.full_like(sigma, 0.9)
    step = dynamics.step(x, v, sigma, sigma_next, sigma_max, noise)
    p = Point(
        x=x,
        sigma=sigma,
        advantage=torch.tensor(advantage, dtype=torch.float64),
        x_next=step.x_next,
        sigma_next=sigma_next,
        sigma_max=sigma_max,
        log_prob=dynamics.log_prob(*step),
        frozen={"reference": ref},
    )
    return p, v.requires_grad_()


def gradient(algorithm: GRPO, p: Point, v: Tensor) -> Tensor:
    loss, _ = algorithm.loss(p, v)
    return torch.autograd.grad(loss.sum(), v)[0]


def shifted(p: Point, log_ratio: float) -> Point:
    """The same point, recorded as if the old policy had found its step less probable by this much."""
    assert p.log_prob is not None
    p.log_prob = p.log_prob - log_ratio
    return p


@pytest.mark.parametrize(("name", "dynamics"), [("grpo_flowsde_0_f64", FlowSDE), ("grpo_cps_0_f64", CPS)])
def test_the_reference_loss_and_gradient_are_reproduced(golden, agrees, precision, name, dynamics):
    cast, tolerance = precision
    d = golden(name)
    rows = torch.ones(len(d["sample"]), dtype=torch.float64)
    p = Point(
        x=d["sample"],
        sigma=d["sigma"] * rows,
        advantage=d["advantages"],
        x_next=d["prev_sample"],
        sigma_next=d["sigma_next"] * rows,
        sigma_max=SD3_SECOND_SIGMA * rows,
        log_prob=d["log_prob_old"],
        frozen={"reference": d["v_ref"]},
    )
    algorithm = GRPO(dynamics(d["eta"].item()), clip=d["clip_range"].item(), kl_beta=d["beta"].item())
    v = cast(d["v_new"]).requires_grad_()
    loss, metrics = algorithm.loss(cast(p), v)
    loss.mean().backward()
    assert agrees(metrics["ratio"], d["ratio"], tolerance)
    assert agrees(loss.mean(), d["loss"], tolerance)
    assert agrees(v.grad, d["grad_v"], tolerance)
    if algorithm.kl_beta:
        assert agrees(metrics["kl"].mean(), d["kl_loss"], tolerance)


def test_the_clipped_term_of_mixgrpo_is_the_same(golden, agrees):
    d = golden("mixgrpo_loss_0_f64")
    log_prob = d["log_prob_new"].requires_grad_()
    log_ratio, share = log_prob - d["log_prob_old"], d["grad_accum"] * d["window"]
    policy = pessimistic(d["adv"], log_ratio.exp(), d["clip_range"].item()).mean() / share
    kl = (0.5 * log_ratio**2).mean() / share  # our metric approx_kl
    (policy + d["kl_coeff"] * kl).backward()
    assert agrees(policy, d["policy_loss"], 1e-9)
    assert agrees(kl, d["kl_loss"], 1e-9)
    assert agrees(log_prob.grad, d["grad_log_prob"], 1e-9)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_ratio_is_one_on_policy(dynamics):
    p, v = on_policy(dynamics, [1.0, -1.0, 2.0, 0.5])
    loss, metrics = GRPO(dynamics).loss(p, v)
    assert metrics["ratio"].tolist() == [1.0] * 4
    assert not metrics["clip_fraction"].any()
    assert not metrics["approx_kl"].any()
    assert torch.equal(loss, -p.advantage)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_on_policy_gradient_is_the_policy_gradient(dynamics):
    p, v = on_policy(dynamics, [1.0, -1.0, 2.0, 0.5])
    assert p.sigma_next is not None
    assert p.x_next is not None
    mean, std = dynamics.moments(p.x, v, p.sigma, p.sigma_next, p.sigma_max)
    surrogate = -(p.advantage * dynamics.log_prob(p.x_next, mean, std)).sum()
    expected = torch.autograd.grad(surrogate, v)[0]
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(GRPO(dynamics), p, v), expected)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "alive"), [(1.0, 0.2, False), (1.0, -0.2, True), (-1.0, 0.2, True), (-1.0, -0.2, False)]
)
def test_clipping_stops_only_what_has_already_gone_far_enough(advantage, log_ratio, alive):
    p, v = on_policy(FlowSDE(0.7), [advantage])
    algorithm = GRPO(FlowSDE(0.7), clip=0.1)
    p = shifted(p, log_ratio)
    assert bool(gradient(algorithm, p, v).any()) is alive
    loss, metrics = algorithm.loss(p, v)
    assert metrics["clip_fraction"].item() == 1
    expected = math.exp(log_ratio) if alive else 1 + math.copysign(0.1, log_ratio)
    assert loss.item() == pytest.approx(-advantage * expected)


def test_advantages_are_clipped():
    p, v = on_policy(FlowSDE(0.7), [9.0, -7.0, 2.0])
    loss, metrics = GRPO(FlowSDE(0.7)).loss(p, v)
    assert metrics["advantage"].tolist() == [5, -5, 2]
    torch.testing.assert_close(loss, -metrics["advantage"])
    assert GRPO(FlowSDE(0.7), adv_clip=1.5).loss(p, v)[1]["advantage"].tolist() == [1.5, -1.5, 1.5]


@pytest.mark.parametrize("log_ratio", [0.0, 0.5, -0.5])
def test_zero_advantage_and_zero_kl_give_zero_gradient(log_ratio):
    p, v = on_policy(FlowSDE(0.7), [0.0, 0.0])
    algorithm = GRPO(FlowSDE(0.7))
    p = shifted(p, log_ratio)
    loss, _ = algorithm.loss(p, v)
    assert not loss.any()
    assert not gradient(algorithm, p, v).any()


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("kl", ["x", "gaussian", "v"])
def test_the_penalty_pulls_towards_the_reference_and_ends_there(dynamics, kl):
    p, v = on_policy(dynamics, [0.0, 0.0])
    algorithm = GRPO(dynamics, kl_beta=0.04, kl=kl)
    pull = gradient(algorithm, p, v)
    assert (pull * (v - p.frozen["reference"])).sum() > 0
    loss, metrics = algorithm.loss(p, v)
    torch.testing.assert_close(loss, 0.04 * metrics["kl"])
    p.frozen["reference"] = v.detach()
    assert not gradient(algorithm, p, v).any()


def test_the_velocity_penalty_by_hand():
    p, v = on_policy(FlowSDE(0.7), [0.0])
    p.frozen["reference"] = v.detach() - 2
    _, metrics = GRPO(FlowSDE(0.7), kl_beta=1.0, kl="v").loss(p, v)
    assert metrics["kl"].item() == pytest.approx(4.0)


def test_the_gaussian_penalty_undoes_the_step_size_in_the_published_one():
    p, v = on_policy(FlowSDE(0.7), [0.0, 0.0])
    published, gaussian = (GRPO(FlowSDE(0.7), kl_beta=1.0, kl=kl).loss(p, v)[1]["kl"] for kl in ("x", "gaussian"))
    torch.testing.assert_close(published, 0.1 * gaussian)  # every step of these points has -dt = 0.1


def test_the_reference_is_needed_only_for_a_penalty():
    assert GRPO(FlowSDE(0.7)).frozen == ()
    assert GRPO(FlowSDE(0.7), kl_beta=0.01).frozen == ("reference",)
    p, v = on_policy(FlowSDE(0.7), [1.0])
    p.frozen = {}
    _, metrics = GRPO(FlowSDE(0.7)).loss(p, v)
    assert "kl" not in metrics


def test_metrics_are_per_sample_and_detached():
    p, v = on_policy(FlowSDE(0.7), [1.0, -1.0, 0.0])
    loss, metrics = GRPO(FlowSDE(0.7), kl_beta=0.01).loss(p, v)
    assert loss.shape == (3,)
    assert set(metrics) == {"ratio", "clip_fraction", "approx_kl", "advantage", "kl"}
    assert all(m.shape == (3,) and not m.requires_grad for m in metrics.values())


def test_a_variant_needs_to_override_one_method():
    class Doubled(GRPO):
        def weight(self, p: Point, std: Tensor) -> Tensor:
            return torch.full_like(p.advantage, 2.0)

    class Flat(GRPO):
        def log_ratio(self, p: Point, mean: Tensor, std: Tensor) -> Tensor:
            return 0.0 * super().log_ratio(p, mean, std)

    p, v = on_policy(FlowSDE(0.7), [1.0, -2.0])
    p = shifted(p, 0.3)
    plain = GRPO(FlowSDE(0.7), clip=1.0).loss(p, v)[0]
    torch.testing.assert_close(Doubled(FlowSDE(0.7), clip=1.0).loss(p, v)[0], 2 * plain)
    assert Flat(FlowSDE(0.7)).loss(p, v)[1]["ratio"].tolist() == [1, 1]


def test_a_noised_point_is_refused_by_name():
    p, v = on_policy(FlowSDE(0.7), [1.0])
    p.x_next = None
    with pytest.raises(ValueError, match="x_next"):
        GRPO(FlowSDE(0.7)).loss(p, v)


@pytest.mark.parametrize("dynamics", [ODE(), FlowSDE(0.0), CPS(0.0)])
def test_dynamics_without_a_density_are_refused(dynamics):
    with pytest.raises(ValueError, match="is deterministic"):
        GRPO(dynamics)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"adv_clip": -1.0}, {"kl_beta": -0.1}, {"kl": "y"}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GRPO(FlowSDE(0.7), **wrong)
