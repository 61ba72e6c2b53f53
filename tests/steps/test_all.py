import pytest

from flowalign.steps import All, StepPlan


def test_every_step_is_noisy_and_all_but_the_last_are_trained():
    assert All()(0, 4) == StepPlan(noisy=(True,) * 4, trained=(0, 1, 2))


@pytest.mark.parametrize(("num_steps", "trained"), [(10, 9), (6, 5), (100, 99), (200, 198)])
def test_ninety_nine_percent_are_trained(num_steps, trained):
    assert All()(0, num_steps).trained == tuple(range(trained))


def test_the_epoch_does_not_matter():
    assert All()(0, 10) == All()(7, 10)


def test_a_share_of_the_schedule_counts_from_the_noisy_side():
    assert All(trained=0.5)(0, 10).trained == (0, 1, 2, 3, 4)


def test_a_schedule_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="leaves none to train"):
        All()(0, 1)
    assert All(trained=1.0)(0, 1).trained == (0,)


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="trained is a share of the steps and lies in"):
        All(share)
    with pytest.raises(ValueError, match=r"trained=0.99 cannot exceed noisy=0.5: use steps.trained=0.5"):
        All(noisy=0.5)
    with pytest.raises(ValueError, match="noisy is a share of the steps and lies in"):
        All(noisy=share)
