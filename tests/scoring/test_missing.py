"""Pictures without a score: left out by name and number, or the end of the run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowalign.rewards.base import RewardError
from flowalign.scoring import Missing

NAN = float("nan")
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])
REWARDS = torch.tensor([[1, 1], [1, NAN], [1, 1], [1, 1], [NAN, NAN], [1, 1]])
BOTH = torch.tensor([1.0, 0.5])


def valid(missing: Missing, rewards: Tensor = REWARDS, weights: Tensor = BOTH) -> list[bool]:
    return missing.valid(rewards, GROUPS, weights, ["clip", "ocr"]).tolist()


def test_a_sample_is_dropped_alone_or_with_its_group():
    assert valid(Missing("drop_sample")) == [True, False, True, True, False, True]
    assert valid(Missing("drop_group")) == [False, False, True, True, False, False]


def test_a_reward_that_does_not_count_is_not_missed():
    assert valid(Missing("drop_sample"), weights=torch.tensor([1.0, 0.0])) == [True] * 4 + [False, True]
    assert valid(Missing("stop", 0), torch.ones(6, 2)) == [True] * 6


@pytest.mark.parametrize(
    ("missing", "rewards", "sentence"),
    [
        (Missing("stop"), REWARDS, r"2 of 6 pictures could not be scored \(ocr: 2, clip: 1\), and missing=stop"),
        (Missing(at_most=0.3), REWARDS, r"2 of the 6 pictures .* \(ocr: 2, clip: 1\), more than max_missing=0.3"),
        (Missing(at_most=1), REWARDS * NAN, r"not a single picture of this epoch could be scored \(clip: 6, ocr: 6\)"),
        (Missing("drop_group", 1), REWARDS[[0, 1, 1, 0, 4, 0]], r"every group .* use missing=drop_sample"),
    ],
)
def test_too_many_stop_the_run_and_the_sentence_says_which_reward(missing: Missing, rewards: Tensor, sentence: str):
    with pytest.raises(RewardError, match=sentence) as refusal:
        valid(missing, rewards)
    assert "before the end of the first epoch there is none" in str(refusal.value)


def test_the_limit_itself_is_allowed():
    assert sum(valid(Missing(at_most=1 / 3))) == 4


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="missing is one of drop_sample, drop_group, stop"):
        Missing("zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share of the samples"):
        Missing(at_most=2)
