import math

import pytest
import torch

from flowalign.algorithms import DGPO
from flowalign.algorithms.errors import matching


def test_a_group_by_hand(noised):
    p, v = noised([1.0, -2.0, 0.5, 0.5], members=2)
    moved = v.detach() + 0.001
    d, d_ref = matching(p, moved), matching(p, v)
    S = 10 * (p.advantage * (d - d_ref)).reshape(2, 2).mean(1)
    weight = S.sigmoid().repeat_interleave(2)
    loss, metrics = DGPO(beta=10.0, clip=1.0).loss(p, moved)
    torch.testing.assert_close(metrics["group_weight"], weight)
    torch.testing.assert_close(loss, weight * p.advantage * d)


def test_at_the_reference_it_is_advantage_weighted_matching_at_half_weight(noised, gradient):
    p, v = noised([1.0, -2.0, 0.5, -0.5], members=2)
    expected = torch.autograd.grad((0.5 * p.advantage * matching(p, v)).sum(), v)[0]
    torch.testing.assert_close(gradient(DGPO(), p, v), expected)


@pytest.mark.parametrize(
    ("advantage", "towards", "alive"),
    [(1.0, True, False), (1.0, False, True), (-1.0, True, True), (-1.0, False, False)],
)
def test_a_row_stops_when_it_has_gone_far_enough(noised, gradient, advantage, towards, alive):
    p, v = noised([advantage])
    target = p.eps - p.x0
    moved = (v + (0.1 if towards else -0.1) * (target - v)).detach().requires_grad_()
    assert bool(gradient(DGPO(clip=1e-3), p, moved).any()) is alive
    assert DGPO(clip=1e-3).loss(p, moved)[1]["clip_fraction"].item() == (not alive)


def test_a_group_that_already_prefers_its_better_samples_weighs_less(noised):
    p, v = noised([1.0, -1.0], members=2)
    toward = (p.eps - p.x0 - v) * torch.tensor([1.0, -1.0])[:, None, None]
    weight = DGPO(beta=1.0, clip=9.0).loss(p, (v + 0.1 * toward).detach())[1]["group_weight"]
    assert weight[0] == weight[1] < 0.5
    assert DGPO().loss(p, v)[1]["group_weight"].tolist() == [0.5, 0.5]


def test_zero_advantage_gives_zero_gradient(noised, gradient):
    p, v = noised([0.0, 0.0], members=2)
    assert not gradient(DGPO(), p, (v + 0.1).detach().requires_grad_()).any()


def test_it_says_what_it_needs():
    assert DGPO().frozen == DGPO(kl_beta=0.1).frozen == ("old", "reference")
    assert (DGPO.together, DGPO.shared_noise, DGPO.samples_with) == ("group", True, "old")
    assert math.isinf(DGPO(clip=math.inf).clip)
    with pytest.raises(ValueError, match="clip"):
        DGPO(clip=0.0)
