import pytest

from flowalign.steps import Fast


def test_the_window_lies_in_the_noisier_half():
    plans = [Fast(3, seed=0)(epoch, 10) for epoch in range(100)]
    assert {plan.trained for plan in plans} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    for plan in plans:
        assert tuple(i for i, noisy in enumerate(plan.noisy) if noisy) == plan.trained


def test_the_range_is_a_choice():
    starts = {Fast(2, seed=0, low=3, high=10)(epoch, 10).trained[0] for epoch in range(200)}
    assert starts == set(range(3, 9))


def test_the_place_depends_on_seed_and_epoch_alone():
    first = [Fast(2, seed=0)(epoch, 20) for epoch in range(30)]
    assert [Fast(2, seed=0)(epoch, 20) for epoch in reversed(range(30))][::-1] == first
    assert [Fast(2, seed=1)(epoch, 20) for epoch in range(30)] != first


def test_a_short_schedule_has_room_for_one_window():
    assert Fast(3, seed=0)(7, 4).trained == (0, 1, 2)


def test_no_room_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"no room for 3 steps in 0 .. 1 .*steps.width=2, steps.high=3"):
        Fast(3, seed=0, high=2)(0, 4)
    with pytest.raises(ValueError, match="no room for 5 steps"):
        Fast(5, seed=0)(0, 4)
    with pytest.raises(ValueError, match="at least one step"):
        Fast(0, seed=0)
