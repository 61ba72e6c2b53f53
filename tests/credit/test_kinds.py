"""GDPO, ranks, logarithms and extremes, each by hand or against its reference."""

import math

import pytest
import torch

from flowalign.credit import GDPO, Best, GroupCredit, Groups, LogTame, Rank
from flowalign.credit.rank import ranked


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_reference_gdpo_is_reproduced(golden, agrees):
    d = golden("flowawr_energies")
    rewards = torch.stack([d["r1"], d["r2"], d["r3"]], dim=1)
    advantage = GDPO(1e-4, floor=False)(rewards, d["group_id"], weights=d["weights"])
    assert agrees(advantage, d["gdpo_plain_adv"][:, 0], 1e-12)


def test_gdpo_listens_to_a_quiet_reward_as_to_a_loud_one():
    group = torch.zeros(4, dtype=torch.long)
    loud, quiet = f64(0, 1000, 0, 1000), f64(0, 0, 1e-3, 1e-3)
    both = torch.stack([loud, quiet], dim=1)
    # Each is ±1, so their sum is -2, 0, 0, 2, with deviation sqrt(2).
    expected = f64(-2, 0, 0, 2) / math.sqrt(2)
    torch.testing.assert_close(GDPO()(both, group), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(GroupCredit("group")(both, group), GroupCredit("group")(loud, group), rtol=0, atol=1e-5)


def test_ranks_by_hand():
    rewards, group = f64(3, 1, 2, 9, 9, 5), torch.tensor([0, 0, 0, 1, 1, 1])
    # 1, 0, 1/2 and, where two share ranks 1 and 2 of 0..2, 3/4, 3/4, 0.
    ranks = f64(1, 0, 0.5, 0.75, 0.75, 0)
    torch.testing.assert_close(Rank("group")(rewards, group), GroupCredit("group", 1e-6, floor=True)(ranks, group))


def test_equal_rewards_in_the_order_of_the_samples():
    """argsort(argsort(r)) / (K - 1), as PaCo's code has it."""
    rewards, group = f64(0, 1, 1, 0, 5, 5, 5, 5), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    ranks = f64(0, 2, 3, 1, 0, 1, 2, 3) / 3
    then = GroupCredit("global", 1e-6, floor=True)
    torch.testing.assert_close(Rank(ties="order")(rewards, group), then(ranks, group))
    drawn = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(0)).double()
    at = torch.arange(40) % 5
    for number in range(5):
        mine = drawn[at == number]
        assert torch.equal(
            ranked(drawn, Groups.of(at), "order")[at == number], mine.argsort(stable=True).argsort().double() / 7
        )
    with pytest.raises(ValueError, match="shared"):
        Rank(ties="none")  # pyright: ignore[reportArgumentType]


def test_ranks_do_not_see_distances():
    rewards, group = torch.randn(20, dtype=torch.float64), torch.arange(20) % 2
    torch.testing.assert_close(Rank()(rewards.exp() ** 3, group), Rank()(rewards, group), rtol=0, atol=0)


def test_only_the_reward_that_varies_more_than_the_median_is_tamed():
    rewards, group = torch.stack([f64(0, 10, 0, 30), f64(5, 6, 5, 6)], dim=1), torch.tensor([0, 0, 1, 1])
    tamed = rewards[:, 0].log1p() + rewards[:, 1]
    then = GroupCredit("global", 1e-6, floor=True)
    torch.testing.assert_close(LogTame("median")(rewards, group), then(tamed, group))
    torch.testing.assert_close(LogTame(100.0)(rewards, group), then(rewards.sum(1), group))
    torch.testing.assert_close(LogTame(0.0)(rewards, group), then(rewards.log1p().sum(1), group))


def test_a_logarithm_of_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="above -1"):
        LogTame(-100.0)(f64(-3, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="threshold"):
        LogTame("mode")  # pyright: ignore[reportArgumentType]


def test_the_extremes_by_hand():
    rewards, group = f64(1, 5, 2, 7, 7, 0, 4, 4), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    assert Best()(rewards, group).tolist() == [0, 1, 0, 0.5, 0.5, 0, 0, 0]
    assert Best(worst=True)(rewards, group).tolist() == [-1, 1, 0, 0.5, 0.5, -1, 0, 0]
