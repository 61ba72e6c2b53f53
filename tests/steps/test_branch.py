import pytest

from flowalign.steps import Branch


def test_neighbours_share_a_step_and_the_next_ones_take_the_next_step():
    plan = Branch(2, seed=0)(0, 4)
    assert plan.trained == (0, 1, 2)
    assert plan.noisy == (True, True, True, False)
    assert [plan.own_step(sample) for sample in range(12)] == [0, 0, 1, 1, 2, 2] * 2
    assert plan.trunk == 6
    assert plan.points == 1


def test_a_step_is_stochastic_for_its_own_samples_only():
    plan = Branch(2, seed=0)(0, 4)
    assert [plan.rows(step, range(6)) for step in range(4)] == [[0, 1], [2, 3], [4, 5], []]
    assert plan.rows(1, [9, 1, 8]) == [0, 2]


def test_fewer_steps_are_drawn_anew_every_epoch():
    plans = [Branch(2, seed=0, num=2)(epoch, 10) for epoch in range(50)]
    assert {len(plan.trained) for plan in plans} == {2}
    assert {step for plan in plans for step in plan.trained} == set(range(9))
    assert plans == [Branch(2, seed=0, num=2)(epoch, 10) for epoch in range(50)]


def test_a_single_branch_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="at least 2"):
        Branch(1, seed=0)
    with pytest.raises(ValueError, match="at least one step"):
        Branch(2, seed=0, num=0)
