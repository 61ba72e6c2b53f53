import math

import pytest
import torch
from torch import Tensor

from flowalign.algorithms import NFT
from flowalign.flow import interpolate, mean_dims, velocity, x0_from
from flowalign.types import Point, required


def at_old_policy(advantage: list[float]) -> tuple[Point, Tensor]:
    """Noised points and a live velocity that still equals the old one."""
    torch.manual_seed(0)
    batch = len(advantage)
    x0, eps, v, ref = torch.randn(4, batch, 3, 5, dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.7, 0.4, 0.2], dtype=torch.float64)[:batch]
    p = Point(
        x=interpolate(x0, eps, sigma),
        sigma=sigma,
        advantage=torch.tensor(advantage, dtype=torch.float64),
        x0=x0,
        eps=eps,
        frozen={"old": v, "reference": ref},
    )
    return p, v.clone().requires_grad_()


def gradient(algorithm: NFT, p: Point, v: Tensor) -> Tensor:
    loss, _ = algorithm.loss(p, v)
    return torch.autograd.grad(loss.sum(), v)[0]


@pytest.mark.parametrize("name", ["nft_0_f64", "nft_1_f64"])
def test_the_reference_loss_and_gradient_are_reproduced(golden, agrees, precision, name):
    cast, tolerance = precision
    d = golden(name)
    algorithm = NFT(d["beta"].item(), d["adv_clip_max"].item(), d["kl_beta"].item(), str(d["adv_mode"]))  # pyright: ignore[reportArgumentType]
    p = Point(
        x=interpolate(d["x0"], d["noise"], d["t"]),
        sigma=d["t"],
        advantage=d["advantages"],
        x0=d["x0"],
        frozen={"old": d["v_old"], "reference": d["v_ref"]},
    )
    assert agrees(p.x, d["xt"], 1e-12)
    v = cast(d["v_new"]).requires_grad_()
    loss, metrics = algorithm.loss(cast(p), v)
    loss.mean().backward()
    assert agrees(metrics["r"], d["r"], tolerance)
    assert agrees(metrics["loss_positive"], d["positive_loss"], tolerance)
    assert agrees(metrics["loss_negative"], d["negative_loss"], tolerance)
    assert agrees(metrics["kl"].mean(), d["kl"], tolerance)
    assert agrees((loss - algorithm.kl_beta * metrics["kl"]) / 5, d["per_sample_loss"], tolerance)
    assert agrees(loss.mean(), d["loss"], tolerance)
    assert agrees(v.grad, d["grad_v"], tolerance)


def test_one_number_by_hand():
    # x0 = 0, eps = 2, sigma = 1/2: x = 1. The live v = 1 predicts 1/2, the old v = 0 predicts 1, the mirrored -1 3/2.
    one = torch.ones(1, 1, dtype=torch.float64)
    p = Point(x=one, sigma=one[0] / 2, advantage=one[0], x0=0 * one, frozen={"old": 0 * one})
    loss, metrics = NFT(kl_beta=0.0, adv_clip=2.0).loss(p, one)
    # Square over mean absolute error leaves the absolute error itself.
    assert metrics["loss_positive"].item() == 0.5
    assert metrics["loss_negative"].item() == 1.5
    assert metrics["r"].item() == 0.75
    assert metrics["v_drift"].item() == 1
    assert loss.item() == 2 * (0.75 * 0.5 + 0.25 * 1.5)


def test_a_good_sample_attracts_and_a_bad_one_repels():
    p, v = at_old_policy([5.0, -5.0, 5.0, -5.0])
    step = -gradient(NFT(kl_beta=0.0), p, v)
    # What a gradient step does to the predicted sample, against the way from the prediction to the true one.
    x0 = required(p.x0, "x0")
    moved = -p.sigma[:, None, None] * step
    way = x0 - x0_from(p.x, v.detach(), p.sigma)
    cosine = torch.cosine_similarity(moved.flatten(1), way.flatten(1))
    torch.testing.assert_close(cosine, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_zero_advantage_gives_zero_gradient_at_the_old_policy(beta):
    p, v = at_old_policy([0.0, 0.0, 0.0])
    algorithm = NFT(beta=beta, kl_beta=0.0)
    loss, metrics = algorithm.loss(p, v)
    assert metrics["r"].tolist() == [0.5] * 3
    assert loss.isfinite().all()
    assert gradient(algorithm, p, v).abs().max() < 1e-15
    assert gradient(algorithm, p.index(torch.tensor([0])), v[:1] + 1).abs().max() > 1e-6


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_with_equal_weights_the_minimum_is_a_mixture_of_old_and_true_velocity(monkeypatch, beta):
    monkeypatch.setattr("flowalign.algorithms.errors.size", lambda error: error.new_ones(len(error)))
    p, v_old = at_old_policy([5.0, -5.0, 2.5, 0.0])
    true = velocity(required(p.x0, "x0"), required(p.eps, "eps"))
    reach = (2 * NFT().optimality(p.advantage) - 1)[:, None, None] / beta
    best = (v_old + reach * (true - v_old)).detach().requires_grad_()
    assert gradient(NFT(beta, kl_beta=0.0), p, best).abs().max() < 1e-13
    lowest = NFT(beta, kl_beta=0.0).loss(p, best)[0]
    assert (NFT(beta, kl_beta=0.0).loss(p, best + 0.01 * true)[0] > lowest).all()


@pytest.mark.parametrize("advantage", [2.5, -2.5])
def test_the_adaptive_weights_decide_for_one_side(advantage):
    # A square over its own size is an absolute value, and the least sum of two of these lies at the nearer end.
    p, v_old = at_old_policy([advantage])
    true = velocity(required(p.x0, "x0"), required(p.eps, "eps"))
    slopes = []
    for reach in (0.5, 0.99, 1.01):  # on the way from the old velocity to the true or the mirrored one
        v = (v_old + math.copysign(reach, advantage) * (true - v_old)).detach().requires_grad_()
        way = math.copysign(1, advantage) * (true - v_old).detach()
        slopes.append(float((gradient(NFT(kl_beta=0.0), p, v) * way).sum()))
    assert slopes[0] < 0
    assert slopes[1] < 0 < slopes[2]


def test_a_perfect_prediction_is_finite():
    p, _ = at_old_policy([1.0, -1.0])
    # x0 = 0 makes the error exactly zero, without rounding: 0 / 0 unless the scale has a floor.
    p.x0, eps = torch.zeros_like(p.x), required(p.eps, "eps")
    p.x, v = interpolate(p.x0, eps, p.sigma), velocity(p.x0, eps).requires_grad_()
    p.frozen["old"] = v.detach()
    loss, _ = NFT(kl_beta=0.0).loss(p, v)
    assert loss.isfinite().all()
    assert gradient(NFT(kl_beta=0.0), p, v).isfinite().all()


def test_the_weight_of_the_error_carries_no_gradient():
    p, v = at_old_policy([5.0])
    algorithm = NFT(kl_beta=0.0)
    error = x0_from(p.x, v.detach(), p.sigma) - required(p.x0, "x0")
    # d/dv of 5 mean(error^2) / w at constant w, with d error / d v = -sigma = -1.
    expected = -5 * 2 * error / error[0].numel() / mean_dims(error.abs())
    torch.testing.assert_close(gradient(algorithm, p, v), expected)


@pytest.mark.parametrize(
    ("mode", "r"),
    [
        ("all", [0.0, 0.4, 0.5, 0.7, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.7, 1.0]),
        ("negative_only", [0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_modes_by_hand(mode, r):
    advantage = torch.tensor([-8.0, -1.0, 0.0, 2.0, 8.0])
    assert NFT(adv_mode=mode).optimality(advantage).tolist() == pytest.approx(r)


def test_a_narrower_clip_or_range_makes_credit_more_decided():
    advantage = torch.tensor([-3.0, 0.75, 3.0])
    assert NFT(adv_clip=1.5).optimality(advantage).tolist() == pytest.approx([0, 0.75, 1])
    assert NFT(adv_range=1.5).optimality(advantage).tolist() == pytest.approx([0, 0.75, 1])


def test_the_clip_scales_the_loss_and_the_range_does_not():
    p, v = at_old_policy([0.0])
    one, _ = NFT(kl_beta=0.0, adv_clip=1.0).loss(p, v)
    two, _ = NFT(kl_beta=0.0, adv_clip=2.0).loss(p, v)
    ranged, _ = NFT(kl_beta=0.0, adv_clip=2.0, adv_range=1.0).loss(p, v)
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(ranged, two)


def test_the_penalty_is_the_squared_distance_to_the_reference():
    p, v = at_old_policy([0.0, 0.0])
    p.frozen["reference"] = v.detach() - 3
    bare, _ = NFT(kl_beta=0.0).loss(p, v)
    loss, metrics = NFT(kl_beta=0.1).loss(p, v)
    assert metrics["kl"].tolist() == pytest.approx([9, 9])
    torch.testing.assert_close(loss - bare, 0.1 * metrics["kl"])
    assert gradient(NFT(kl_beta=0.1), p, v).min() > 0


def test_the_reference_is_needed_only_for_a_penalty():
    assert NFT().frozen == ("old", "reference")
    assert NFT(kl_beta=0.0).frozen == ("old",)
    p, v = at_old_policy([1.0])
    del p.frozen["reference"]
    _, metrics = NFT(kl_beta=0.0).loss(p, v)
    assert "kl" not in metrics


def test_metrics_are_per_sample_and_detached():
    p, v = at_old_policy([1.0, -1.0, 0.0])
    loss, metrics = NFT().loss(p, v)
    assert loss.shape == (3,)
    assert set(metrics) == {"r", "loss_positive", "loss_negative", "v_drift", "kl"}
    assert all(m.shape == (3,) and not m.requires_grad for m in metrics.values())


def test_any_sampler_will_do():
    assert not NFT.stochastic
    assert NFT.point == "noised"


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"adv_mode": "some"}, {"adv_range": 0.0}, {"adv_clip": 0.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NFT(**wrong)
