import math

import pytest
import torch

from flowalign.credit import GDPO, Energies, GroupCredit, LogTame, Rank, group_stats

NAN = float("nan")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("reward", ["r1", "r2", "r3"])
@pytest.mark.parametrize("std", ["global", "group"])
def test_the_reference_advantages_are_reproduced(golden, agrees, reward, std):
    d = golden("flowawr_energies")
    theirs = d[f"adv_{reward}_{std}_soft_tau1"].clamp(-5, 5)
    assert agrees(GroupCredit(std)(d[reward], d["group_id"]).clamp(-5, 5), theirs, 1e-12)


def test_two_groups_by_hand():
    rewards, group = f64(1, 3, 10, 14), torch.tensor([7, 7, 2, 2])
    assert GroupCredit("group", eps=0)(rewards, group).tolist() == [-1, 1, -1, 1]
    overall = math.sqrt(27.5)  # squares about the mean of 7: 36, 16, 9 and 49, by 4
    expected = f64(-1, 1, -2, 2) / overall
    torch.testing.assert_close(GroupCredit("global", eps=0)(rewards, group), expected)


def test_eps_is_added_to_the_deviation_and_ddof_subtracted_from_the_count():
    rewards, group = f64(0, 2), torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(GroupCredit("group", eps=1.0)(rewards, group), f64(-0.5, 0.5))
    torch.testing.assert_close(GroupCredit("group", eps=0, ddof=1)(rewards, group), f64(-1, 1) / math.sqrt(2))


@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
def test_a_group_without_spread_gets_exactly_zero(std, eps):
    # The mean of three times 0.1 is not 0.1 in floating point: without care this divides rounding noise by eps.
    advantage = GroupCredit(std, eps=eps)(torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 1]))
    assert advantage[:3].tolist() == [0, 0, 0]
    assert advantage[4] > 0


@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_missing_scores_are_left_out_of_every_statistic(std, ddof):
    credit = GroupCredit(std, ddof=ddof)
    kept = credit(f64(1, 2, 4, 8), torch.tensor([0, 0, 1, 1]))
    with_gaps = credit(f64(1, NAN, 2, 4, 8, 100), torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([True] * 5 + [False]))
    torch.testing.assert_close(with_gaps[[0, 2, 3, 4]], kept)
    assert with_gaps[[1, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("std", ["global", "group"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_with_fewer_than_two_scores_gets_zero(std, ddof):
    rewards, group = f64(5, 1, NAN, NAN, NAN, 0, 1), torch.tensor([0, 1, 1, 2, 2, 3, 3])
    advantage = GroupCredit(std, ddof=ddof)(rewards, group)
    assert advantage[:5].tolist() == [0] * 5
    assert advantage[6] > 0


def test_an_epoch_without_any_score_gives_zero():
    assert GroupCredit()(f64(NAN, NAN), torch.tensor([0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("std", ["global", "group"])
def test_credit_follows_the_samples_when_they_are_permuted(std):
    rewards, group = torch.randn(24, dtype=torch.float64), torch.arange(24) % 4
    order = torch.randperm(24)
    credit = GroupCredit(std)
    torch.testing.assert_close(credit(rewards[order], group[order]), credit(rewards, group)[order])


def test_credit_is_blind_to_the_offset_of_a_group():
    rewards, group = torch.randn(12, dtype=torch.float64), torch.arange(12) % 3
    credit = GroupCredit("group")
    torch.testing.assert_close(credit(rewards + 10.0 * group, group), credit(rewards, group))


def test_credit_is_float64_for_float32_rewards():
    assert GroupCredit()(torch.tensor([0.0, 1.0]), torch.tensor([0, 0])).dtype == torch.float64


def test_an_infinite_reward_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        GroupCredit()(f64(0, math.inf), torch.tensor([0, 0]))


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="batch"):
        GroupCredit("batch")  # pyright: ignore[reportArgumentType]


def test_several_rewards_are_added_up_first():
    rewards, group = torch.stack([f64(1, 0, 3, 3), f64(2, 4, 6, 0)], dim=1), torch.tensor([0, 0, 1, 1])
    weights = f64(1, 0.5)
    together = GroupCredit()(f64(2, 2, 6, 3), group)
    torch.testing.assert_close(GroupCredit()(rewards, group, weights=weights), together)
    torch.testing.assert_close(GroupCredit()(rewards, group), GroupCredit()(f64(3, 4, 9, 3), group))


def test_or_their_advantages_are():
    rewards, group = torch.stack([f64(0, 2, 5, 5), f64(0, 200, 0, 8)], dim=1), torch.tensor([0, 0, 1, 1])
    credit = GroupCredit("group", eps=0, ddof=1, aggregate="advantages")
    half = math.sqrt(0.5)  # an unbiased std makes a pair ±1/sqrt(2), whatever its size
    expected = f64(-3 * half, 3 * half, -half, half)
    torch.testing.assert_close(credit(rewards, group, weights=f64(2, 1)), expected)


def test_a_sample_that_lacks_one_of_its_scores_is_left_out_unless_the_weight_is_zero():
    rewards, group = torch.stack([f64(0, 1, NAN), f64(5, 7, 9)], dim=1), torch.zeros(3, dtype=torch.long)
    kept = GroupCredit()(f64(5, 8), group[:2])
    torch.testing.assert_close(GroupCredit()(rewards, group), torch.cat([kept, f64(0)]))
    torch.testing.assert_close(GroupCredit()(rewards, group, weights=f64(0, 1)), GroupCredit()(f64(5, 7, 9), group))


def test_a_floor_takes_the_larger_of_deviation_and_eps():
    rewards, group = f64(0, 2), torch.zeros(2, dtype=torch.long)
    assert GroupCredit("group", eps=0.5, floor=True)(rewards, group).tolist() == [-1, 1]
    assert GroupCredit("group", eps=4.0, floor=True)(rewards, group).tolist() == [-0.25, 0.25]


def test_as_many_weights_as_rewards_are_needed():
    with pytest.raises(ValueError, match="2 rewards need as many weights"):
        GroupCredit()(torch.zeros(3, 2), torch.zeros(3), weights=torch.ones(3))


def test_an_unknown_meeting_of_rewards_is_refused():
    with pytest.raises(ValueError, match="energies"):
        GroupCredit(aggregate="energies")  # pyright: ignore[reportArgumentType]


def test_a_deviation_that_could_turn_the_sign_is_refused():
    for make in (GroupCredit, GDPO, Rank, LogTame, Energies):
        with pytest.raises(ValueError, match="eps"):
            make(eps=-1e-4)
    with pytest.raises(ValueError, match="ddof"):
        GroupCredit(ddof=2)


def test_group_stats_by_hand():
    stats = group_stats(f64(0, 2, 5, 5, NAN, 8), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert stats["mean"] == 4
    assert stats["within_std"] == pytest.approx(1 / 3)  # deviations 1, 0 and 0
    assert stats["zero_std_fraction"] == pytest.approx(2 / 3)
