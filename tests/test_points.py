import pytest
import torch

from flowalign.points import noised, permuted_steps, transitions
from flowalign.types import Point, Rollout, given

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def rollout(mean: bool = False) -> Rollout:
    """Two samples, steps 0 and 2 recorded; the state says which: 10 * sample + step."""
    x = torch.tensor([[[0.0], [2.0]], [[10.0], [12.0]]])
    return Rollout(
        x0=torch.zeros(2, 1),
        sigmas=SIGMAS,
        steps=(0, 2),
        x=x,
        x_next=x + 100,
        log_prob=x[..., 0] + 200,
        mean=x + 300 if mean else None,
    )


def test_transitions_are_ordered_by_sample_and_then_by_step():
    p = transitions(rollout(), torch.tensor([5.0, 6.0]))
    assert p.x.tolist() == [[0], [2], [10], [12]]
    assert given(p.x_next, "x_next").tolist() == [[100], [102], [110], [112]]
    assert given(p.log_prob, "log_prob").tolist() == [200, 202, 210, 212]
    assert p.sigma.tolist() == [1.0, 0.5, 1.0, 0.5]
    assert given(p.sigma_next, "sigma_next").tolist() == [0.75, 0.25, 0.75, 0.25]
    assert given(p.sigma_max, "sigma_max").tolist() == [0.75] * 4
    assert p.advantage.tolist() == [5, 5, 6, 6]
    assert p.mean is None


def test_means_travel_with_the_transitions_when_they_were_kept():
    p = transitions(rollout(mean=True), torch.zeros(2))
    assert given(p.mean, "mean").tolist() == [[300], [302], [310], [312]]


def test_a_rollout_without_recorded_steps_has_no_transitions():
    with pytest.raises(ValueError, match="`x`"):
        transitions(Rollout(x0=torch.zeros(2, 1), sigmas=SIGMAS), torch.zeros(2))


def noised_point(num: int | None) -> Point:
    x0 = torch.tensor([[0.0], [8.0]])
    noise = torch.tensor([[[4.0], [8.0]], [[0.0], [4.0]]])
    order = torch.tensor([[0, 2], [3, 1]])
    return noised(x0, SIGMAS, torch.tensor([5.0, 6.0], dtype=torch.float64), num, noise, order)


def test_noised_points_are_ordered_by_sample_and_lie_on_the_path():
    p = noised_point(2)
    assert p.sigma.tolist() == [1.0, 0.5, 0.25, 0.75]
    assert p.x.tolist() == [[4], [4], [6], [5]]  # e.g. the last one: 8 / 4 + 4 * 3 / 4
    assert given(p.x0, "x0").tolist() == [[0], [0], [8], [8]]
    assert given(p.eps, "eps").tolist() == [[4], [8], [0], [4]]
    assert p.advantage.tolist() == [5, 5, 6, 6]


def test_fewer_points_are_the_first_ones():
    assert noised_point(1).sigma.tolist() == [1.0, 0.25]


def test_all_but_one_of_a_short_schedule_is_the_default():
    assert permuted_steps(0, 0, [0], 10).shape == (1, 9)
    x0 = torch.zeros(2, 1)
    p = noised(x0, SIGMAS, x0[:, 0], None, torch.zeros(2, 4, 1), torch.zeros(2, 4, dtype=torch.long))
    assert len(p.x) == 2 * 3


def test_too_little_noise_is_refused():
    with pytest.raises(ValueError, match="3 points per sample"):
        noised_point(3)


def test_float64_credit_does_not_make_the_loss_float64():
    assert noised_point(2).advantage.dtype == torch.float32


def test_every_row_of_permuted_steps_is_a_permutation():
    order = permuted_steps(0, 0, range(50), 10, 10)
    assert torch.equal(order.sort(dim=1).values, torch.arange(10).expand(50, 10))
    assert len({tuple(row) for row in order.tolist()}) > 45


def test_permuted_steps_belong_to_the_sample_and_the_epoch():
    order = permuted_steps(1, 2, [3, 4, 5], 10, 9)
    assert torch.equal(permuted_steps(1, 2, torch.tensor([5, 3]), 10, 9), order[[2, 0]])
    assert not torch.equal(permuted_steps(1, 3, [3, 4, 5], 10, 9), order)


def test_every_noise_level_is_visited_equally_often():
    counts = permuted_steps(0, 0, range(2000), 10, 5).flatten().bincount()
    assert counts.min() > 880
    assert counts.max() < 1120
