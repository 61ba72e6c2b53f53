import pytest
import torch

from flowalign.algorithms import CRD
from flowalign.algorithms.errors import adaptive, v_error

TEMPERATURES = {"-1": None, "0": 0.0, "0.5": 0.5}


@pytest.mark.parametrize("distance", ["mse", "bce"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_reference_contrast_is_reproduced(golden, agrees, distance, temperature):
    d = golden("ff_crd")
    algorithm = CRD(distance=distance, temperature=TEMPERATURES[temperature])
    loss = algorithm.contrast(d["r_theta"].double(), d["adv01"].double()).mean()
    assert agrees(loss, d[f"loss_T{temperature}_{distance}"], 1e-6)


def test_the_loss_by_its_formula(noised):
    p, v = noised([5.0, -5.0, 0.0, 2.5])
    moved = v.detach() + 0.3
    r = adaptive(v_error(p, v)) - adaptive(v_error(p, moved))
    a = torch.tensor([1, 0, 0.5, 0.75], dtype=torch.float64)
    loss, metrics = CRD(beta=2.0, kl_beta=0.0).loss(p, moved)
    torch.testing.assert_close(metrics["implied_reward"], r.detach())
    torch.testing.assert_close(metrics["r"], a)
    torch.testing.assert_close(loss, (2.5 * (2 * (r - r.mean()) - (a - a.mean())) ** 2).detach())


def test_it_is_blind_to_a_common_part_of_the_reward(noised, gradient):
    p, v = noised([1.0, 0.0, -1.0, 2.0])
    expected = gradient(CRD(kl_beta=0.0), p, v)
    p.advantage = p.advantage + 0.7
    torch.testing.assert_close(gradient(CRD(kl_beta=0.0), p, v), expected)


@pytest.mark.parametrize("temperature", [None, 0.0, 0.5])
@pytest.mark.parametrize("distance", ["mse", "bce"])
def test_equal_advantages_give_no_gradient_at_the_old_policy(noised, gradient, temperature, distance):
    algorithm = CRD(kl_beta=0.0, temperature=temperature, distance=distance)
    for advantage in (0.0, 2.0, -5.0):  # the last: not one good sample
        p, v = noised([advantage] * 4)
        assert gradient(algorithm, p, v).abs().max() < 1e-15


@pytest.mark.parametrize("temperature", [None, 0.0, 0.5])
@pytest.mark.parametrize("distance", ["mse", "bce"])
def test_as_many_points_as_it_asks_for_teach_something_and_fewer_teach_nothing(noised, gradient, temperature, distance):
    algorithm = CRD(kl_beta=0.0, temperature=temperature, distance=distance)
    for number, moves in ((algorithm.least_micro - 1, False), (algorithm.least_micro, True)):
        p, v = noised([5.0, -5.0][:number])
        assert bool(gradient(algorithm, p, v).abs().max() > 1e-6) is moves


def test_means_have_no_gradient(noised):
    p, v = noised([1.0, 0.0, -1.0])
    step = torch.autograd.grad(CRD(kl_beta=0.0).loss(p, v)[0][0], v)[0]
    assert step[0].any()
    assert not step[1:].any()


def test_the_penalty_grows_with_the_reward(noised):
    p, v = noised([-5.0, 0.0, 5.0])
    p.frozen["reference"] = v.detach() - 1
    algorithm = CRD(kl_beta=0.1)
    weight = (algorithm.kl_beta * algorithm.loss(p, v)[1]["kl"]).tolist()
    assert weight == pytest.approx([1e-4, (0.1 + 1e-4) / 2, 0.1])


def test_it_says_what_it_needs():
    assert CRD(kl_beta=0.0).frozen == ("old",)
    assert CRD().frozen == ("old", "reference")
    assert CRD.samples_with == "sampling"


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"adv_range": -1.0}, {"distance": "l1"}, {"temperature": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CRD(**wrong)
