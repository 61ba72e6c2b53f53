"""The objective and what is only watched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.base import RewardError
from flowalign.rewards.frames import Frames
from flowalign.scoring import Latents, Measure, Scorer
from flowalign.types import Conditioning

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

    with pytest.raises(RewardError, match=r"reward `reward` \(Mean\) returned scores of shape \(\) for 2 samples"):
        Scorer(Mean()).rewards(MEDIA, PROMPTS)


class OfSmallNumbers:
    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return by_metadata(media, prompts, metadata)

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        if metadata["n"] > 1:
            raise ValueError(f"{prompt} is too large")


def test_a_prompt_that_a_reward_cannot_score_is_named_before_training():
    """By the rewards of its phase, through wrappers, and not where such prompts may stay without a score."""
    prompts = [replace(prompt, source=f"train.jsonl:{i}") for i, prompt in enumerate(PROMPTS, 1)]
    for reward in (OfSmallNumbers(), Frames(OfSmallNumbers(), 2)):
        for both in ((prompts, []), ([], prompts)):
            with pytest.raises(RewardError, match=r"^train.jsonl:2: reward `reward` \(.*\): b is too large$"):
                Scorer(reward).check_prompts(*both)
        Scorer(reward).check_prompts(prompts[:1], prompts[:1])
    held_out = Scorer(by_metadata, {"small": OfSmallNumbers()})
    held_out.check_prompts(prompts, [])
    with pytest.raises(RewardError, match="reward `small`"):
        held_out.check_prompts([], prompts)
    Scorer(OfSmallNumbers(), on_error="missing").check_prompts(prompts, prompts)


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


# ------------------------------------------------------------ what rewards ask for


class Compared:
    """How many of its group come before; needs the group whole."""

    groupwise = True

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor) -> Tensor:
        self.calls.append(groups.tolist())
        return torch.tensor([groups[:i].eq(groups[i]).sum() for i in range(len(groups))])


class OfLatents:
    sees = "latents"

    def of_latents(self, x0: Tensor, cond: Conditioning, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return x0.flatten(1).mean(1) + cond["c"].flatten()


def test_a_batch_size_cuts_the_calls_and_leaves_groups_whole():
    prompts, media = PROMPTS * 4, MEDIA.repeat(4, 1, 1, 1)
    groups = torch.tensor([7, 7, 3, 3, 3, 3, 5, 5])
    compared = Compared()
    scorer = Scorer({"rank": Measure(compared, batch_size=4), "n": Measure(by_metadata, batch_size=3)})
    assert scorer.groupwise
    assert scorer.rewards(media, prompts, groups=groups)[:, 0].tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert compared.calls == [[7, 7], [3, 3, 3, 3], [5, 5]]
    compared.calls.clear()
    assert torch.equal(scorer.rewards(media, prompts, groups=groups)[:, 1], torch.tensor([1.0, 2] * 4))
    whole = Scorer(Measure(compared, batch_size=6))
    whole.rewards(media, prompts, groups=groups)
    assert compared.calls[-2:] == [[7, 7, 3, 3, 3, 3], [5, 5]]


def test_groupwise_rewards_are_not_evaluated():
    scorer = Scorer({"rank": Compared(), "n": by_metadata}, weights={"rank": 2, "n": 3})
    assert scorer.measures == ["reward", "n"]
    assert scorer.all(MEDIA, PROMPTS)["reward"].tolist() == [3, 6]
    for held_out in (None, {"n": by_metadata}):  # as many as pictures, whether or not anything is evaluated
        unknown = Scorer(Compared(), held_out).all(MEDIA, PROMPTS)["reward"]
        assert unknown.shape == (2,)
        assert unknown.isnan().all()


def test_rewards_of_latents_get_latents_and_want_no_media():
    latents = Latents(torch.ones(2, 4, 2, 2), Conditioning(c=torch.tensor([[1.0], [2.0]])))
    scorer = Scorer(Measure(OfLatents(), batch_size=1))
    assert not scorer.sees_media
    assert scorer.rewards(None, PROMPTS, latents).tolist() == [[2], [3]]
    assert Scorer({"latent": OfLatents(), "n": by_metadata}).sees_media
    with pytest.raises(RewardError, match=r"\(OfLatents\): it scores latents, and only media are here"):
        scorer.rewards(MEDIA, PROMPTS)
