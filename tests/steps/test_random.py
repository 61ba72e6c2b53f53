import pytest

from flowalign.steps import Random


def test_the_chosen_steps_are_the_noisy_and_the_trained_ones():
    for epoch in range(20):
        plan = Random(3, seed=0)(epoch, 10)
        assert len(plan.trained) == 3
        assert len(plan.noisy) == 10
        assert tuple(i for i, noisy in enumerate(plan.noisy) if noisy) == plan.trained


def test_the_choice_depends_on_seed_and_epoch_alone():
    steps = Random(3, seed=1)
    first = [steps(epoch, 20) for epoch in range(10)]
    again = [steps(epoch, 20) for epoch in reversed(range(10))][::-1]
    assert first == again
    assert len(set(first)) > 5
    assert first != [Random(3, seed=2)(epoch, 20) for epoch in range(10)]


def test_the_last_step_is_never_chosen_and_every_other_one_is():
    chosen = {i for epoch in range(200) for i in Random(2, seed=0)(epoch, 10).trained}
    assert chosen == set(range(9))


def test_the_chosen_steps_need_not_be_neighbours():
    plans = [Random(2, seed=0)(epoch, 10).trained for epoch in range(50)]
    assert any(b - a > 1 for a, b in plans)


def test_more_steps_than_there_are_is_refused():
    with pytest.raises(ValueError, match="cannot choose 10 of 9"):
        Random(10, seed=0)(0, 10)
    with pytest.raises(ValueError, match="at least one"):
        Random(0, seed=0)
