"""What holds for every kind of credit."""

import pytest
import torch
from torch import Tensor

from flowalign.credit import GDPO, Best, Credit, Energies, GroupCredit, LogTame, Rank

NAN = float("nan")
ENERGIES = [Energies(), Energies("hard"), Energies(std="group", aggregate="energies", temperature=0.5)]
KINDS = [
    GroupCredit("global"),
    GroupCredit("group"),
    GroupCredit("group", 1e-8, ddof=1, aggregate="advantages"),
    GroupCredit("global", 1e-6, floor=True),
    GDPO(),
    GDPO(1e-4, floor=False),
    Rank(),
    LogTame("mean"),
    LogTame(0.1),
    *ENERGIES,
    Best(),
    Best(worst=True),
]
"""One of each, and of each that behaves differently."""
BLIND = [GroupCredit("group", 0.0), GDPO(0.0, floor=False), Rank(), Energies(std="group", eps=0.0), Best(worst=True)]
"""Those which only compare within the group."""
WEIGHTS = torch.tensor([1.0, 0.5, 0.1])


def some(samples: int = 24, groups: int = 4) -> tuple[Tensor, Tensor]:
    """Three rewards, positive, and groups that are not in order."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(samples, 3, generator=generator, dtype=torch.float64)
    return rewards, (torch.arange(samples) % groups)[torch.randperm(samples, generator=generator)]


@pytest.mark.parametrize("credit", KINDS)
def test_credit_is_one_float64_number_a_sample(credit: Credit):
    rewards, group = some()
    for given in (rewards.float(), rewards[:, 0], rewards[:, :1]):
        advantage = credit(given, group)
        assert advantage.shape == (24,)
        assert advantage.dtype == torch.float64
        assert advantage.isfinite().all()
        assert advantage.any()


@pytest.mark.parametrize("credit", KINDS)
def test_credit_follows_the_samples_when_they_are_permuted(credit: Credit):
    rewards, group = some()
    rewards[::3] = rewards[0]  # and there are ties
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = credit(rewards[order], group[order], weights=WEIGHTS)
    torch.testing.assert_close(moved, credit(rewards, group, weights=WEIGHTS)[order])


@pytest.mark.parametrize("credit", KINDS)
def test_the_names_of_the_groups_do_not_matter(credit: Credit):
    rewards, group = some()
    torch.testing.assert_close(credit(rewards, 100 - 7 * group), credit(rewards, group))


@pytest.mark.parametrize("credit", BLIND)
def test_credit_is_blind_to_an_affine_change_of_the_rewards_of_a_group(credit: Credit):
    rewards, group = some()
    changed = rewards * (1 + 2 * group[:, None]) - 10 * group[:, None]
    for single in (0, 1, 2):
        torch.testing.assert_close(credit(changed[:, single], group), credit(rewards[:, single], group))


@pytest.mark.parametrize("credit", KINDS)
def test_a_group_without_spread_gets_exactly_zero(credit: Credit):
    rewards, group = some()
    rewards[group == 2] = torch.tensor([0.1, 0.7, 0.3], dtype=torch.float64)
    advantage = credit(rewards, group, weights=WEIGHTS)
    assert not advantage[group == 2].any()
    assert advantage[group != 2].any()


@pytest.mark.parametrize("credit", KINDS)
def test_what_lacks_a_score_gets_zero_and_changes_nothing(credit: Credit):
    rewards, group = some()
    kept = credit(rewards, group, weights=WEIGHTS)
    missing = torch.full((3, 3), NAN, dtype=torch.float64)
    missing[:, 1] = 1.0
    more, groups = torch.cat([missing, rewards, 100 + missing.nan_to_num()]), torch.cat([group[:3], group, group[:3]])
    valid = torch.arange(30) < 27
    advantage = credit(more, groups, valid, WEIGHTS)
    torch.testing.assert_close(advantage[3:27], kept)
    assert not advantage[:3].any()
    assert not advantage[27:].any()


@pytest.mark.parametrize("credit", KINDS)
@pytest.mark.parametrize("values", [[1.0], [NAN, NAN], [NAN, 3.0]])
def test_fewer_than_two_scores_are_nothing_to_compare(credit: Credit, values: list[float]):
    rewards = torch.tensor(values, dtype=torch.float64)
    assert not credit(rewards, torch.zeros(len(values), dtype=torch.long)).any()


@pytest.mark.parametrize("credit", [kind for kind in KINDS if not isinstance(kind, Best)])
def test_a_better_sample_never_gets_less(credit: Credit):
    rewards, group = some()
    r = rewards[:, 0]
    advantage = credit(r, group)
    for g in group.unique():
        ordered = advantage[group == g][r[group == g].argsort()]
        assert (ordered.diff() >= 0).all()


@pytest.mark.parametrize("credit", [kind for kind in KINDS if not isinstance(kind, (Best, *map(type, ENERGIES)))])
def test_advantages_of_a_group_add_up_to_zero(credit: Credit):
    rewards, group = some()
    total = torch.zeros(4, dtype=torch.float64).index_add_(0, group, credit(rewards, group, weights=WEIGHTS))
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
