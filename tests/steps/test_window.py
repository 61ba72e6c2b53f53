from typing import Any

import pytest

from flowalign.steps import All, Window


def starts(epochs: int, num_steps: int, **arguments: Any) -> list[tuple[int, ...]]:
    steps = Window(seed=0, **arguments)
    return [steps(epoch, num_steps).trained for epoch in range(epochs)]


def test_the_window_is_what_is_noisy_and_trained():
    plan = Window(4, seed=0)(30, 25)
    assert plan.trained == (1, 2, 3, 4)
    assert tuple(i for i, noisy in enumerate(plan.noisy) if noisy) == plan.trained
    assert len(plan.noisy) == 25


def test_the_window_slides_in_full_and_begins_again():
    assert starts(7, 6, width=2, stay=2) == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (0, 1)]
    assert starts(5, 6, width=2, stay=1, roll_back=False)[2:] == [(2, 3)] * 3


def test_windows_need_not_overlap_or_move():
    assert starts(4, 8, width=2, stay=1, stride=2) == [(0, 1), (2, 3), (4, 5), (0, 1)]
    assert starts(3, 8, width=3, stay=1, stride=0) == [(0, 1, 2)] * 3


def test_the_published_window_never_reaches_the_last_two_steps():
    places = starts(25 * 20 + 1, 25, width=4)
    assert places[24:26] == [(0, 1, 2, 3), (1, 2, 3, 4)]
    assert max(max(place) for place in places) == 22
    assert places[-1] == (0, 1, 2, 3)


def test_parity_shrinks_empties_and_then_rolls_back():
    """T = 4 trained steps and the test `> T`: at 4 the window is empty for a whole stay."""
    course = [(0, 1), (1, 2), (2, 3), (3,), (), (0, 1)]
    assert starts(6, 6, width=2, stay=1, parity=True) == course
    assert starts(12, 6, width=2, stay=2, parity=True) == [place for place in course for _ in range(2)]
    assert starts(8, 6, width=2, stay=1, parity=True, roll_back=False)[4:] == [()] * 4
    assert starts(4, 6, width=2, stay=1, stride=2, parity=True) == [(0, 1), (2, 3), (), (0, 1)]


def test_a_decaying_stay_shrinks_linearly():
    # T = 8: int(4 (1 - l/8) + l/8) epochs at l = 0 .. 6, in full windows of 2.
    stays = [int(4 * (1 - start / 8) + start / 8) for start in range(7)]
    assert stays == [4, 3, 3, 2, 2, 2, 1]
    expected = [(start, start + 1) for start, stay in enumerate(stays) for _ in range(stay)]
    assert starts(len(expected) + 1, 10, width=2, stay=4, strategy="decay") == [*expected, (0, 1)]


def test_an_exponentially_decaying_stay_shrinks_beyond_the_threshold():
    # ceil(3 exp(-0.5 max(0, l - 2))) = 3, 3, 3, 2, 2, 1
    expected = [(start,) for start, stay in enumerate([3, 3, 3, 2, 2, 1]) for _ in range(stay)]
    chosen = starts(len(expected), 8, width=1, stay=3, strategy="exp_decay", threshold=2, rate=0.5)
    assert chosen == expected


def test_a_random_window_is_drawn_every_epoch_from_all_places():
    places = starts(300, 10, width=3, strategy="random")
    assert {place[0] for place in places} == set(range(6))
    assert all(place == tuple(range(place[0], place[0] + 3)) for place in places)
    assert places != [Window(3, seed=1, strategy="random")(epoch, 10).trained for epoch in range(300)]


@pytest.mark.parametrize("strategy", ["progressive", "random", "decay", "exp_decay"])
def test_a_resumed_run_goes_on_where_the_window_was(strategy):
    steps = Window(3, seed=0, strategy=strategy, stay=3)
    straight = [steps(epoch, 12) for epoch in range(40)]
    assert [Window(3, seed=0, strategy=strategy, stay=3)(epoch, 12) for epoch in range(25, 40)] == straight[25:]


def test_a_window_of_everything_is_flow_grpo():
    assert Window(10, seed=0, skip=0)(7, 10) == All(1.0)(0, 10)
    assert Window(9, seed=0, skip=1)(7, 10).trained == All()(0, 10).trained


def test_a_window_that_does_not_fit_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match=r"window of 4 .* into 5 steps .*steps.width=3, or rollout.num_steps=6"):
        Window(4, seed=0)(0, 5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"strategy": "linear"}, "moves by progressive, random"),
        ({"width": 0}, "width must be at least 1"),
        ({"stay": 0}, "stay must be at least 1"),
        ({"stride": -1}, "cannot be negative"),
        ({"tail": 0.0}, "share of steps kept"),
    ],
)
def test_impossible_settings_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Window(**({"width": 2, "seed": 0} | arguments))
