"""How a reward is called, and what happens when it fails."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowalign.prompts import Prompt
from flowalign.rewards.base import RewardError
from flowalign.scoring import Measure, Ramp, Scorer

PROMPTS = [Prompt("a"), Prompt("b"), Prompt("c")]
MEDIA = torch.rand(3, 3, 4, 4)


class Light:
    """Mean of a picture; raises where told to."""

    def __init__(self, error: Exception | None = None, at: str = "b") -> None:
        self.error, self.at = error, at
        self.checked = self.bound = self.closed = 0

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if self.error and self.at in prompts:
            raise self.error
        return media.flatten(1).mean(1)

    def self_check(self) -> None:
        self.checked += 1
        if self.error and self.at == "check":
            raise self.error

    def close(self) -> None:
        self.closed += 1


class Bound(Light):
    def bind(self, model: Any) -> None:
        assert not self.checked
        self.bound += 1
        assert model == "model"


def tinted(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], channel: int = 0) -> list[float]:
    return media[:, channel].mean(dim=(1, 2)).tolist()


def test_a_plain_function_with_settings_is_a_reward():
    scores = Scorer(partial(tinted, channel=2)).rewards(MEDIA, PROMPTS)[:, 0]
    assert torch.equal(scores, MEDIA[:, 2].mean(dim=(1, 2)))


def test_a_reward_that_raises_ends_the_run_in_a_sentence_with_its_trace_in_the_log(caplog: Any):
    scorer = Scorer({"light": Light(KeyError("colour"))})
    with caplog.at_level(logging.ERROR, "flowalign"), pytest.raises(RewardError) as refusal:
        scorer.rewards(MEDIA, PROMPTS)
    assert str(refusal.value) == "reward `light` (Light): scoring 3 samples failed with KeyError: 'colour'"
    assert "in __call__" in caplog.text


def test_the_reasons_that_a_reward_gives_itself_need_no_trace(caplog: Any):
    with pytest.raises(RewardError, match=r"^reward `light` \(Light\): the server is gone$"):
        Scorer({"light": Light(RewardError("the server is gone"))}).rewards(MEDIA, PROMPTS)
    assert not caplog.records


def test_errors_may_count_as_missing_and_cost_only_their_own_batch(caplog: Any):
    scorer = Scorer(Measure(Light(OSError("gone")), batch_size=1), on_error="missing")
    scores = scorer.rewards(MEDIA, PROMPTS)[:, 0]
    assert scores.isnan().tolist() == [False, True, False]
    assert "failed with OSError: gone; these 1 samples count as not scored" in caplog.text


def test_an_infinite_score_is_refused():
    with pytest.raises(RewardError, match="is infinite: what cannot be scored is NaN"):
        Scorer(lambda *a: torch.tensor([1.0, torch.inf, torch.nan])).rewards(MEDIA, PROMPTS)


def test_a_score_depends_neither_on_autocast_nor_on_gradients():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(48, 1)

        def forward(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            return self.inner(media.flatten(1)).flatten()

    scorer = Scorer(Linear())
    plain = scorer.rewards(MEDIA, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer.rewards(MEDIA, PROMPTS), plain)
    assert not plain.requires_grad


def test_media_come_in_the_type_that_is_asked_for():
    def precision(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return torch.full((len(media),), float(media.dtype == torch.float16))

    assert Scorer(Measure(precision, dtype="float16", device="cpu")).rewards(MEDIA, PROMPTS).sum() == 3
    assert Scorer(precision).rewards(MEDIA, PROMPTS).sum() == 0


def test_checks_come_before_training_and_after_binding():
    free, bound = Light(), Bound()
    scorer = Scorer({"free": free, "bound": bound}, held_out={"third": (third := Light())})
    scorer.check()
    assert (free.checked, bound.checked, third.checked) == (1, 0, 1)
    scorer.bind("model")
    assert (free.checked, bound.checked, bound.bound) == (1, 1, 1)
    scorer.close()
    assert free.closed == bound.closed == third.closed == 1
    off = Scorer({"free": (free := Light()), "bound": (bound := Bound())}, self_check=False)
    off.check()
    off.bind("model")
    assert (free.checked, bound.checked, bound.bound) == (0, 0, 1)


def test_a_failed_check_is_a_sentence_that_names_the_reward():
    for error, sentence in (
        (RewardError("a blank page reads as text"), r"^reward `ocr` \(Light\): a blank page reads as text$"),
        (ImportError("no onnxruntime"), r"`ocr` \(Light\): self-check failed with ImportError: no onnxruntime"),
    ):
        with pytest.raises(RewardError, match=sentence):
            Scorer(Light(), held_out={"ocr": Light(error, "check")}).check()


def test_weights_may_change_over_the_epochs():
    ramp = Ramp(epochs=[2, 4], values=[0.0, 1.0])
    scorer = Scorer({"a": Light(), "b": Measure(Light(), weight=3)}, weights={"a": ramp})
    assert [scorer.weights(epoch).tolist() for epoch in (0, 3, 9)] == [[0, 3], [0.5, 3], [1, 3]]
    assert scorer.weights().tolist() == [1, 3]  # evaluations are always by the last ones
    pair = torch.tensor([[2.0, 1.0], [torch.nan, 1.0]])
    assert scorer.combined(pair, 3).tolist()[0] == 4
    assert scorer.combined(pair, 0).tolist() == [3, 3]  # who has no weight yet is not missed
    with pytest.raises(ValueError, match="not all 0"):
        Scorer(Light(), weights={"reward": ramp})
    with pytest.raises(ValueError, match="ascend"):
        Ramp([4, 2], [0.0, 1.0])
    with pytest.raises(ValueError, match="a value for each"):
        Ramp([4], [0.0, 1.0])


def test_evaluations_leave_out_what_they_are_told_to():
    scorer = Scorer({"a": Light(), "b": Measure(lambda *a: torch.ones(3), evaluate=False)})
    assert scorer.measures == ["reward", "a"]
    scores = scorer.all(MEDIA, PROMPTS)
    assert torch.equal(scores["reward"], scores["a"])
