"""The objective and what is only watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.scoring import Scorer

PROMPTS = [Prompt("a", metadata={"n": 1}), Prompt("b", metadata={"n": 2})]
MEDIA = torch.rand(2, 3, 4, 4)


def by_metadata(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    assert len(media) == len(prompts) == len(metadata)
    return torch.tensor([float(entry["n"]) for entry in metadata], dtype=torch.float64)


def test_the_objective_and_every_held_out_measure_are_reported_apart():
    scorer = Scorer(by_metadata, {"double": lambda *a: 2 * by_metadata(*a)})
    scores = scorer.all(MEDIA, PROMPTS)
    assert set(scores) == set(scorer.measures) == {"reward", "double"}
    assert scores["double"].tolist() == [2, 4]
    assert scorer.rewards(MEDIA, PROMPTS).tolist() == [[1], [2]]
    assert scores["reward"].dtype == torch.float32


def test_a_missing_score_stays_missing():
    scorer = Scorer(lambda *a: torch.tensor([1.0, torch.nan]))
    assert scorer.rewards(MEDIA, PROMPTS).isnan().tolist() == [[False], [True]]
    both = Scorer({"n": by_metadata, "gap": lambda *a: torch.tensor([1.0, torch.nan])})
    assert both.all(MEDIA, PROMPTS)["reward"].isnan().tolist() == [False, True]
    unused = Scorer({"n": by_metadata, "gap": lambda *a: torch.tensor([1.0, torch.nan])}, weights={"gap": 0})
    assert unused.all(MEDIA, PROMPTS)["reward"].tolist() == [1, 2]


def test_a_reward_of_another_shape_is_refused_by_name():
    class Mean:
        def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            return media.mean()

    with pytest.raises(ValueError, match=r"Mean returned scores of shape \(\) for 2 samples"):
        Scorer(Mean()).rewards(MEDIA, PROMPTS)


def test_several_rewards_stay_apart_and_their_weighted_sum_is_reported():
    scorer = Scorer({"n": by_metadata, "square": lambda *a: by_metadata(*a) ** 2}, weights={"square": 0.5})
    assert scorer.rewards(MEDIA, PROMPTS).tolist() == [[1, 1], [2, 4]]
    assert scorer.all(MEDIA, PROMPTS)["reward"].tolist() == [1.5, 4]
    assert scorer.measures == ["reward", "n", "square"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weights": {"m": 1}}, r"weights are given to \['m'\], but the rewards are \['n'\]"),
        ({"weights": {"n": 0}}, "not all 0"),
        ({"weights": {"n": float("nan")}}, "finite weights"),
        ({"held_out": {"n": by_metadata}}, r"\['n'\] cannot be both trained on and held out"),
    ],
)
def test_impossible_weights_and_names_are_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Scorer({"n": by_metadata}, **settings)


def test_a_held_out_measure_cannot_take_the_objectives_name():
    with pytest.raises(ValueError, match="cannot be called `reward`"):
        Scorer(by_metadata, {"reward": by_metadata})
