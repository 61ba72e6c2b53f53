"""Several Scorers as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.reward_nodes import held_out, is_evaluated, objective
from flowalign.run import compose_config, instantiate
from flowalign.scoring import Measure, Ramp, Scorer, combined

PROMPTS = [Prompt("a", metadata={"n": 1}), Prompt("b", metadata={"n": 2})]
MEDIA = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def number(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([float(entry["n"]) for entry in metadata])


def light(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return media.mean(dim=(1, 2, 3))


def parts() -> dict[str, Scorer]:
    two = Scorer({"n": number, "light": light}, weights={"n": 3, "light": Ramp([0, 4], [0, 2])})
    return {"pair": two, "one": Scorer(number, {"light": light, "twice": lambda *a: 2 * number(*a)})}


def test_the_total_is_the_weighted_sum_of_the_totals_of_its_parts():
    whole = combined(parts(), weights={"pair": 0.5, "one": 7})
    for epoch in (0, 1, 9):
        apart = [s.combined(s.rewards(MEDIA, PROMPTS), epoch) for s in parts().values()]
        assert torch.allclose(whole.combined(whole.rewards(MEDIA, PROMPTS), epoch), 0.5 * apart[0] + 7 * apart[1])


def test_names_are_those_of_the_parts_and_of_their_rewards():
    whole = combined(parts(), held_out={"thrice": number})
    assert list(whole.objective) == ["n", "light", "one"]
    assert list(whole.held_out) == ["twice", "thrice"]  # light is trained on by another part
    assert all(measure.name == name for name, measure in whole.every.items())


def test_settings_are_those_of_the_whole():
    def broken(*arguments: Any) -> Tensor:
        raise ValueError("broken")

    whole = combined({"a": Scorer(broken), "b": Scorer(number)}, on_error="missing", missing="drop_group", ahead=0)
    assert whole.rewards(MEDIA, PROMPTS).isnan().tolist() == [[True, False]] * 2
    assert (whole.missing.policy, whole.ahead) == ("drop_group", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"two": 1}}, r"weights are given to \['two'\], but the rewards are \['one', 'pair'\]"),
        ({"weights": {"pair": Ramp([0], [1])}}, "cannot multiply another one"),
        ({"parts": parts() | {"n": Scorer(number)}}, "two of the rewards are called n"),
        ({"parts": {"own": Scorer(number, missing="stop")}}, "own sets missing=stop for itself: set reward.missing"),
        ({"parts": {"own": Scorer(number, on_error="missing")}}, "own sets on_error=missing for itself"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        combined(**({"parts": parts()} | arguments))


def test_a_list_of_options_on_the_command_line_composes_their_sum():
    words = ("reward=[shapes,brightness]", "reward.weights.brightness=0.25", "reward.missing=stop")
    scorer = instantiate(compose_config(*words).reward)
    assert scorer.weights().tolist() == [1, 0.25]
    assert list(scorer.objective) == ["shapes", "brightness"]
    assert list(scorer.held_out) == ["strict", "quality"]
    assert scorer.missing.policy == "stop"


@pytest.mark.parametrize(
    "chosen", ["shapes", "shapes_apart", "shapes_win_rate", "[shapes,jpeg]", "[shapes_apart,brightness]"]
)
def test_the_names_read_from_a_config_are_those_of_the_built_scorer(chosen: str):
    node = compose_config(f"reward={chosen}").reward
    scorer = instantiate(node)
    assert list(objective(node)) == list(scorer.objective)
    assert list(held_out(node)) == list(scorer.held_out)
    assert is_evaluated(node) == any(measure.evaluate for measure in scorer.objective.values())


def test_a_measure_in_a_config_is_read_through():
    node = compose_config("reward=jpeg", "reward.objective._target_=flowalign.rewards.jpeg.Jpeg").reward
    node.objective = {"_target_": "flowalign.scoring.Measure", "reward": node.objective, "evaluate": False}
    assert [found["_target_"] for found in objective(node).values()] == ["flowalign.rewards.jpeg.Jpeg"]
    assert not is_evaluated(node)
    assert isinstance(instantiate(node).objective["reward"], Measure)
