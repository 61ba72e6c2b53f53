"""Win rates and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowalign.rewards.groupwise import WinRate, win_rate, wins

GROUPS = torch.tensor([4, 4, 4, 4, 9, 9])


def rated(scores: list[float], groups: Tensor = GROUPS, margin: float = 0.0) -> list[float]:
    reward = WinRate(lambda media, prompts, metadata: torch.tensor(scores), margin)
    return reward(torch.zeros(len(scores), 3, 1, 1), [""] * len(scores), [{}] * len(scores), groups).tolist()


def test_it_is_the_rank_in_the_group():
    assert rated([1, 30, 2, -5, 0.2, 0.1]) == pytest.approx([1 / 3, 1, 2 / 3, 0, 1, 0])


def test_equals_share_their_mean_rank():
    assert rated([1, 1, 1, 1, 2, 2]) == [0.5] * 6
    assert rated([3, 1, 1, 0, 2, 2]) == pytest.approx([1, 0.5, 0.5, 0, 0.5, 0.5])


def test_nothing_but_the_order_counts():
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0))
    assert rated(scores.tolist()) == rated((5 * scores.exp() + 100).tolist())


def test_the_mean_of_a_group_is_a_half():
    scores = torch.randn(6, generator=torch.Generator().manual_seed(1)).round()
    found = torch.tensor(rated(scores.tolist()))
    assert torch.allclose(torch.stack([found[:4].mean(), found[4:].mean()]), torch.tensor(0.5))


def test_the_place_of_a_groups_members_does_not_matter():
    order = torch.tensor([5, 2, 0, 4, 3, 1])
    scores = torch.tensor([1, 30, 2, -5, 0.2, 0.1])
    assert rated(scores[order].tolist(), GROUPS[order]) == torch.tensor(rated(scores.tolist()))[order].tolist()


def test_within_the_margin_is_a_tie():
    assert rated([1.0, 1.4, 2.0, 1.0, 0, 0], margin=0.5) == pytest.approx([1 / 3, 1 / 3, 1, 1 / 3, 0.5, 0.5])


def test_what_was_not_scored_is_not_compared():
    found = torch.tensor(rated([1, torch.nan, 2, 3, 7, torch.nan]))
    assert found[[0, 2, 3]].tolist() == [0, 0.5, 1]
    assert found[[1, 4, 5]].isnan().all()  # the fifth has nobody left to be compared with


def test_a_win_of_one_is_the_loss_of_the_other():
    outcome = wins(torch.tensor([1.0, 2.0, 2.0]))
    assert torch.equal(outcome + outcome.T, torch.ones(3, 3))
    assert win_rate(outcome, torch.zeros(3)).tolist() == [0, 0.75, 0.75]


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match="margin"):
        WinRate(lambda *given: torch.zeros(1), -1)
