from typing import Any

import pytest
from omegaconf import OmegaConf

from flowalign.checks import ConfigError, check_signatures, suggest
from tests.checks.conftest import TOYS


def refusal(node: dict[str, Any], **outer: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_signatures({"node": node, **outer})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def toy(toy_class: str, /, **values: Any) -> dict[str, Any]:
    return {"_target_": f"{TOYS}.{toy_class}", **values}


@pytest.mark.parametrize(
    "node",
    [
        toy("NFT", beta=1, adv_range=None, _partial_=True, _convert_="all"),
        toy("GRPO", dynamics=toy("NFT"), kl="v"),
        toy("Recipe", size=[1, 2], weights={"a": 1}, names=["x"], other={"any": "thing"}),
        toy("Logger", folder="x", version=3),
        toy("build", name="x", inner=toy("NFT")),
        {"_target_": "math.prod"},
        {"_target_": None, "x": 1},
    ],
)
def test_what_the_class_takes_passes(node: dict[str, Any]):
    check_signatures({"node": node})
    check_signatures(OmegaConf.create({"list": [node], "again": "${list}"}))


@pytest.mark.parametrize(
    ("node", "sentence"),
    [
        (toy("NFT", kl_beta="abc"), "node.kl_beta: expected a float, got 'abc'"),
        (toy("NFT", kl_beta=True), "node.kl_beta: expected a float, got true"),
        (toy("NFT", kl_beta=None), "node.kl_beta: expected a float, got null"),
        (toy("NFT", kl_beta={"a": 1}), "node.kl_beta: expected a float, got a mapping"),
        (toy("NFT", adv_range="x"), "node.adv_range: expected a float or null, got 'x'"),
        (toy("NFT", rounds=1e3), "node.rounds: expected an integer, got 1000.0"),
        (toy("NFT", kl_bta=0), "node.kl_bta: NFT has no parameter kl_bta; did you mean kl_beta?"),
        (toy("GRPO", kl="gausian"), "expected one of 'x', 'gaussian', 'v', got 'gausian'; did you mean gaussian?"),
        (toy("Recipe", size=[1, 2, 3]), "node.size: expected a list of 2, got [1, 2, 3]"),
        (toy("Recipe", size=[1, "b"]), "node.size: expected a list of 2, got [1, 'b']"),
        (toy("Recipe", weights=3), "node.weights: expected a mapping, got 3"),
        (toy("Recipe", weights={"a": 1, "b": "c"}), "node.weights.b: expected a float, got 'c'"),
        (toy("Recipe", weights={"a": None}), "node.weights.a: expected a float, got null; ~node.weights.a removes it"),
        (toy("Recipe", names="abc"), "node.names: expected a list of text, got 'abc'"),
        (toy("Recipe", deep="yes"), "node.deep: expected true or false, got 'yes'"),
        (toy("Logger", folder=3), "node.folder: expected text, got 3"),
        (toy("build", nme="x"), "node.nme: build has no parameter nme; did you mean name?"),
        (toy("NFT", zzz=0), "has no parameter zzz; available: "),
        (toy("NFT", zzz=0), "; ~node.zzz removes it"),
        (toy("NFT", zzz=None), "; node.zzz=0 ~node.zzz removes it"),
        (toy("NTF"), "node: tests.checks.toys has no NTF; did you mean NFT?"),
        ({"_target_": "flowalign.chekcs.ConfigError"}, "node: flowalign has no chekcs; did you mean checks?"),
        ({"_target_": "no_such_package.Thing"}, "node: cannot import no_such_package.Thing"),
    ],
)
def test_what_the_class_would_not_take_is_refused(node: dict[str, Any], sentence: str):
    assert sentence in refusal(node)


def test_a_plain_value_is_no_object_of_ours():
    solver = "node.solver: expected a section with the _target_ of a Solver, got"
    for value in (5, "euler", None, [1]):
        node = {"_target_": "flowalign.sampler.Sampling", "num_steps": 4, "solver": value}
        assert solver in refusal(node)
    check_signatures({"node": {"_target_": "flowalign.sampler.Sampling", "solver": {"_target_": "math.prod"}}})
    parts = {"objective": {"_target_": "math.prod"}, "held_out": {"strict": None}}
    sentence = "node.held_out.strict: expected a section with the _target_ of a Reward or"
    assert sentence in refusal({"_target_": "flowalign.scoring.Scorer", **parts})


def test_our_own_classes_are_judged_before_libraries():
    assert "flowalign" in refusal({"_target_": "no_such_package.X"}, ours={"_target_": "flowalign.checks.ConfigErorr"})


def test_nested_nodes_are_named_by_their_path():
    with pytest.raises(ConfigError, match=r"^a\.callbacks\[1\]\.beta: "):
        check_signatures({"a": {"callbacks": [toy("NFT"), toy("NFT", beta="x")]}})


def test_suggest_names_the_nearest_or_lists_all():
    assert suggest("nftt", ["grpo", "nft"]) == "did you mean nft?"
    assert suggest("KL-Beta", ["kl_beta"]) == "did you mean kl_beta?"
    assert suggest("sd3", ["sd3_5_medium", "flux"]) == "did you mean sd3_5_medium?"
    assert suggest("zzz", ["b", "a"]) == "available: a, b"
    assert suggest("zzz", []) == "there is nothing to choose from"
