"""PRFL on three numbers and on a reward that is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowalign.algorithms import PRFL, SFT
from flowalign.points import interleave, next_level, noised
from flowalign.types import Point

X0, NOISE = torch.tensor([[1.0], [-2.0]]), torch.tensor([[[0.5]], [[3.0]]])


def point(**changes: Tensor) -> Point:
    p = noised(X0, torch.tensor([[0.8], [0.4]]), NOISE, torch.zeros(2))
    p.sigma_next = torch.tensor([0.5, 0.0])
    for name, value in changes.items():
        setattr(p, name, value)
    return p


def test_it_lands_one_step_down_the_schedule_and_at_the_end_on_the_sample_itself():
    p = point()
    truth = NOISE[:, 0] - X0
    x, sigma = PRFL().lands(p, truth)
    assert torch.allclose(x, torch.tensor([[0.5 * 1.0 + 0.5 * 0.5], [-2.0]]))
    assert sigma.tolist() == [0.5, 0.0]


def test_the_loss_of_three_numbers_by_hand():
    v = torch.tensor([[0.0], [4.0]])
    reward, real = torch.tensor([0.25, 0.5]), torch.tensor([False, True])
    loss, metrics = PRFL(scale=0.1, margin=2.0, sft_weight=3.0).loss(point(reward=reward, real=real), v)
    assert torch.allclose(loss, torch.tensor([0.1 * 1.75, 3 * (4.0 - 5.0) ** 2]))
    assert metrics["landing"].tolist() == [0.25, 0.25]
    assert metrics["matching"].tolist() == [1, 1]
    beyond, _ = PRFL(margin=0.2).loss(point(reward=reward), v)
    assert beyond.tolist() == [0, 0]


def test_a_step_against_the_gradient_raises_the_reward_of_where_it_lands():
    algorithm, p = PRFL(scale=1.0, sft_weight=0.0), point()

    def reward(v: Tensor) -> Tensor:
        return torch.sigmoid(algorithm.lands(p, v)[0][:, 0])

    v = torch.zeros(2, 1, requires_grad=True)
    p.reward = reward(v)
    algorithm.loss(p, v)[0].sum().backward()
    assert v.grad is not None
    assert (reward(v.detach() - 0.1 * v.grad) > reward(v.detach())).all()


def test_on_given_pictures_it_is_flow_matching():
    v = torch.randn(2, 1, generator=torch.Generator().manual_seed(0))
    p = point(reward=torch.zeros(2), real=torch.ones(2, dtype=torch.bool))
    assert torch.allclose(PRFL(sft_weight=1.0).loss(p, v)[0].double(), SFT().loss(p, v)[0].double())


def test_without_its_weight_no_given_picture_is_asked_for():
    assert PRFL(sft_weight=0.0).source == "rollout"
    assert PRFL(sft_weight=0.5).source == "both"
    for settings in ({"scale": 0.0}, {"sft_weight": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            PRFL(**settings)


def test_below_is_the_next_lower_level():
    sigmas = torch.tensor([1.0, 0.7, 0.3, 0.0])
    assert torch.equal(
        next_level(sigmas, torch.tensor([1.0, 0.7, 0.3, 0.9, 0.1, 0.0])), torch.tensor([0.7, 0.3, 0, 0.7, 0, 0])
    )


def test_both_kinds_of_points_of_a_sample_are_neighbours():
    sigma, noise = torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.zeros(2, 2, 1)
    own, real = noised(X0, sigma, noise, torch.ones(2)), noised(10 * X0, sigma, noise, torch.ones(2))
    p = interleave(own, real, samples=2)
    assert p.x0 is not None
    assert p.real is not None
    assert p.x0.flatten().tolist() == [1, 1, 10, 10, -2, -2, -20, -20]
    assert p.real.tolist() == [False, False, True, True] * 2
    assert torch.equal(p.sigma, torch.tensor([0.8, 0.2, 0.8, 0.2, 0.4, 0.6, 0.4, 0.6]))
