import pytest
import torch

from flowalign.algorithms import AWM
from flowalign.algorithms.errors import matching
from flowalign.flow import interpolate
from flowalign.types import Point

NAMES = {"Uniform": "uniform", "ELBO": "elbo", "t": "t", "t**2": "t2"}


@pytest.mark.parametrize("name", ["awm_00_f64", "awm_04_f64", "awm_08_f64"])
def test_the_reference_loss_and_gradient_are_reproduced(golden, agrees, precision, name):
    cast, tolerance = precision
    d = golden(name)
    T, B = int(d["T"]), int(d["B"])
    p = Point(
        x=interpolate(d["x0"], d["noise"], d["t"]),
        sigma=d["t"],
        advantage=d["advantages"].repeat(T),
        x0=d["x0"],
        eps=d["noise"],
        sample=torch.arange(B).repeat(T),
        frozen={"old": d["v_old"], "reference": d["v_ref"], "anchor": d["v_ema"]},
    )
    algorithm = AWM(
        NAMES[str(d["weighting"])],  # pyright: ignore[reportArgumentType]
        str(d["loss_type"]),  # pyright: ignore[reportArgumentType]
        *(d[key].item() for key in ("clip_range", "adv_clip_max", "advantage_max", "kl_beta", "ema_beta")),
        kl=NAMES[str(d["kl_weight"])],  # pyright: ignore[reportArgumentType]
        power=d["ghuber_power"].item(),
        off_policy=True,
    )
    v = cast(d["v_new"]).requires_grad_()
    loss, metrics = algorithm.loss(cast(p), v)
    loss.mean().backward()
    assert agrees(algorithm.log_prob(cast(p), v), d["log_prob"], tolerance)
    assert agrees(algorithm.log_prob(cast(p), cast(d["v_old"])), d["old_log_prob"], tolerance)
    assert agrees(metrics["ratio"][: len(d["ratio"])], d["ratio"], tolerance)
    assert agrees(metrics["kl"].mean(), d["kl_loss"], tolerance)
    if algorithm.ema_beta:
        assert agrees(metrics["kl_anchor"].mean(), d["ema_kl_loss"], tolerance)
    assert agrees(loss.mean(), d["loss"], tolerance)
    assert agrees(v.grad, d["grad_v"], tolerance)


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
@pytest.mark.parametrize("ratio", ["exp_first", "sum_first"])
def test_on_policy_it_is_the_policy_gradient_of_its_log_prob(noised, gradient, weighting, ratio):
    p, v = noised([5.0, -2.5, 0.0, 10.0])
    algorithm = AWM(weighting, ratio, ema_beta=0.0)
    loss, metrics = algorithm.loss(p, v)
    assert metrics["ratio"].tolist() == [1.0] * 4
    assert loss.tolist() == [-1, 0.5, 0, -1]  # advantages of ±5 are scaled to ±1, not clipped there
    expected = torch.autograd.grad(-(metrics["advantage"] * algorithm.log_prob(p, v)).sum(), v)[0]
    torch.testing.assert_close(gradient(algorithm, p, v), expected)


def test_weightings_by_hand(noised):
    p, v = noised([1.0, 1.0])
    m, t = matching(p, v), p.sigma
    for weighting, expected in (
        ("uniform", -m),
        ("t", -m * t),
        ("t2", -m * t * t),
        ("huber", -m.sqrt() * t),
        ("ghuber", -4 * m**0.25 * t),
    ):
        assert (AWM(weighting).log_prob(p, v) - expected).abs().max() < (0.02 if weighting == "ghuber" else 2e-5)
    torch.testing.assert_close(AWM("ghuber", power=1.0).log_prob(p, v), AWM("t").log_prob(p, v))


def test_sum_first_has_one_ratio_a_sample(noised):
    p, v = noised([1.0, 1.0, -1.0, -1.0])
    p.sample = torch.tensor([7, 7, 3, 3])
    algorithm = AWM(ratio="sum_first", off_policy=True, ema_beta=0.0)
    moved = v.detach() + torch.arange(4)[:, None, None] * 0.1
    ratio = algorithm.loss(p, moved)[1]["ratio"]
    change = algorithm.log_prob(p, moved) - algorithm.log_prob(p, v)
    torch.testing.assert_close(ratio, change.reshape(2, 2).mean(1).exp().repeat_interleave(2).detach())
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(algorithm.loss(p.index(order), moved[order])[1]["ratio"], ratio[order])


def test_the_copies_that_it_asks_for():
    assert AWM().frozen == ("anchor",)
    assert AWM(ema_beta=0.0, kl_beta=0.1, off_policy=True).frozen == ("old", "reference")
    assert AWM.together == "sample"


def test_the_anchor_pulls_back(noised, gradient):
    p, v = noised([0.0, 0.0])
    assert not gradient(AWM(), p, v).any()
    p.frozen["anchor"] = v.detach() - 2
    assert gradient(AWM(), p, v).min() > 0
    _, metrics = AWM().loss(p, v)
    assert metrics["kl_anchor"].tolist() == pytest.approx([4, 4])


@pytest.mark.parametrize(
    "wrong", [{"weighting": "t3"}, {"ratio": "mean"}, {"kl": "x"}, {"clip": 0.0}, {"ema_beta": -1.0}, {"power": 0.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AWM(**wrong)
