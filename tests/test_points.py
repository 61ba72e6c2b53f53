import pytest
import torch

from flowalign.points import noised, transitions
from flowalign.types import Point, Rollout, required

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def rollout(mean: bool = False) -> Rollout:
    """Two samples, steps 0 and 2 recorded; the state says which: 10 * sample + step."""
    x = torch.tensor([[[0.0], [2.0]], [[10.0], [12.0]]])
    return Rollout(
        x0=torch.zeros(2, 1),
        sigmas=SIGMAS,
        steps=torch.tensor([[0, 2], [0, 2]]),
        x=x,
        x_next=x + 100,
        log_prob=x[..., 0] + 200,
        std=torch.tensor([[0.5, 0.3], [0.5, 0.3]]),
        mean=x + 300 if mean else None,
    )


def test_transitions_are_ordered_by_sample_and_then_by_step():
    p = transitions(rollout(), torch.tensor([5.0, 6.0]))
    assert p.x.tolist() == [[0], [2], [10], [12]]
    assert required(p.x_next, "x_next").tolist() == [[100], [102], [110], [112]]
    assert required(p.log_prob, "log_prob").tolist() == [200, 202, 210, 212]
    assert p.sigma.tolist() == [1.0, 0.5, 1.0, 0.5]
    assert required(p.sigma_next, "sigma_next").tolist() == [0.75, 0.25, 0.75, 0.25]
    assert required(p.sigma_max, "sigma_max").tolist() == [0.75] * 4
    assert p.advantage.tolist() == [5, 5, 6, 6]
    assert p.mean is None


def test_means_travel_with_the_transitions_when_they_were_kept():
    p = transitions(rollout(mean=True), torch.zeros(2))
    assert required(p.mean, "mean").tolist() == [[300], [302], [310], [312]]


def test_a_rollout_without_recorded_steps_has_no_transitions():
    with pytest.raises(ValueError, match="`x`"):
        transitions(Rollout(x0=torch.zeros(2, 1), sigmas=SIGMAS), torch.zeros(2))


def test_rows_know_their_group_their_sample_and_the_mean_noise_of_the_trained_steps():
    p = transitions(rollout(), torch.zeros(2), group=torch.tensor([7, 8]), sample=torch.tensor([3, 4]))
    assert required(p.group, "group").tolist() == [7, 7, 8, 8]
    assert required(p.sample, "sample").tolist() == [3, 3, 4, 4]
    assert torch.allclose(required(p.std_scale, "std_scale"), torch.full((4,), 0.4))
    assert transitions(rollout(), torch.zeros(2)).group is None


def test_samples_may_have_recorded_different_steps():
    """Three branches of step 0 and one of step 2: the mean noise is that of the two steps."""
    x = torch.zeros(4, 1, 1)
    steps, std = torch.tensor([[0], [0], [0], [2]]), torch.tensor([[0.5], [0.5], [0.5], [0.1]])
    p = transitions(Rollout(x[:, 0], SIGMAS, steps, x, x, x[..., 0], std), torch.zeros(4))
    assert p.sigma.tolist() == [1.0, 1.0, 1.0, 0.5]
    assert required(p.sigma_next, "sigma_next").tolist() == [0.75, 0.75, 0.75, 0.25]
    assert torch.allclose(required(p.std_scale, "std_scale"), torch.full((4,), 0.3))


def noised_point() -> Point:
    x0 = torch.tensor([[0.0], [8.0]])
    noise = torch.tensor([[[4.0], [8.0]], [[0.0], [4.0]]])
    sigma = torch.tensor([[1.0, 0.5], [0.25, 0.75]])
    advantage = torch.tensor([5.0, 6.0], dtype=torch.float64)
    return noised(x0, sigma, noise, advantage, torch.tensor([7, 8]), torch.tensor([3, 4]))


def test_noised_points_are_ordered_by_sample_and_lie_on_the_path():
    p = noised_point()
    assert p.sigma.tolist() == [1.0, 0.5, 0.25, 0.75]
    assert p.x.tolist() == [[4], [4], [6], [5]]  # e.g. the last one: 8 / 4 + 4 * 3 / 4
    assert required(p.x0, "x0").tolist() == [[0], [0], [8], [8]]
    assert required(p.eps, "eps").tolist() == [[4], [8], [0], [4]]
    assert p.advantage.tolist() == [5, 5, 6, 6]
    assert required(p.group, "group").tolist() == [7, 7, 8, 8]
    assert required(p.sample, "sample").tolist() == [3, 3, 4, 4]


def test_float64_credit_does_not_make_the_loss_float64():
    assert noised_point().advantage.dtype == torch.float32
