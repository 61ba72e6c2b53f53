"""The live network and its frozen copies: swapped and restored bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowalign.algorithms import Decay
from flowalign.policy import Full, Lora, Policy
from flowalign.policy.follow import Average, Follow
from flowalign.policy.policy import FrozenCopy

TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


def outputs(transformer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 4, 16, 16, generator=generator),
            timestep=torch.tensor([900.0, 100.0]),
            encoder_hidden_states=torch.randn(2, 5, 64, generator=generator),
            pooled_projections=torch.randn(2, 64, generator=generator),
            return_dict=False,
        )[0]


def tuned(transformer: nn.Module, kind: str, *copies: str) -> Policy:
    tune = Lora(rank=4, alpha=8) if kind == "lora" else Full()
    return Policy({"transformer": transformer}, tune, TARGETS, copies)


def move(policy: Policy, by: float = 0.1) -> None:
    """Change every trained parameter, each differently, as an optimiser would."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in policy.trained().values():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_start_at_the_base_bit_for_bit(transformer: Any):
    base = outputs(transformer)
    policy = tuned(transformer, "lora")
    assert torch.equal(outputs(transformer), base)
    move(policy)
    assert not torch.equal(outputs(transformer), base)


def test_adapters_start_equal_whatever_was_drawn_before(transformer: Any):
    from copy import deepcopy

    other = deepcopy(transformer)
    one = tuned(transformer, "lora")
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    two = tuned(other, "lora")
    assert same(dict(one.trained()), dict(two.trained()))
    assert torch.equal(torch.get_rng_state(), state)  # and leave the global generator as it was


def test_adapters_train_a_few_parameters_and_full_tuning_all(transformer: Any):
    before = sum(p.numel() for p in transformer.parameters())
    policy = tuned(transformer, "lora")
    assert 0 < policy.parameter_counts()["trained"] < before
    assert all("lora" in name for name in policy.trained())
    everything = tuned(transformer, "full")
    assert everything.parameter_counts()["trained"] == everything.parameter_counts()["parameters"] > before


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_copy_holds_the_trained_parameters_only(transformer: Any, kind: str):
    policy = tuned(transformer, kind, "old", "reference")
    for copy in policy.copies.values():
        assert sum(p.numel() for p in copy.parameters()) == policy.parameter_counts()["trained"]
        assert not any(p.requires_grad for p in copy.parameters())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_inside_use_the_network_is_the_copy_and_afterwards_itself(transformer: Any, kind: str):
    policy = tuned(transformer, kind, "reference")
    start = outputs(transformer)
    move(policy)
    moved, held = outputs(transformer), weights(policy)
    identities = [id(p) for p in policy.parameters()]
    with policy.use("reference"):
        assert torch.equal(outputs(transformer), start)
        assert not torch.is_grad_enabled()
    assert torch.equal(outputs(transformer), moved)
    assert same(weights(policy), held)
    assert [id(p) for p in policy.parameters()] == identities


def test_an_exception_inside_use_restores_the_weights(transformer: Any):
    policy = tuned(transformer, "lora", "old")
    move(policy)
    held = weights(policy)
    with pytest.raises(KeyError), policy.use("old"):
        raise KeyError
    assert same(weights(policy), held)
    with policy.use("old"):  # and the policy can be used again
        pass


def test_use_of_nothing_is_the_live_network(transformer: Any):
    policy = tuned(transformer, "lora", "old")
    move(policy)
    moved = outputs(transformer)
    with policy.use(None):
        assert torch.equal(outputs(transformer), moved)


def test_nested_use_is_refused_and_leaves_no_trace(transformer: Any):
    policy = tuned(transformer, "lora", "old", "reference")
    move(policy)
    held = weights(policy)
    sentence = "'old' is in use; copies cannot be nested"
    with pytest.raises(RuntimeError, match=sentence), policy.use("old"), policy.use("reference"):
        pass
    assert same(weights(policy), held)


def test_the_copy_in_use_may_be_asked_for_again(transformer: Any):
    policy = Policy({"transformer": transformer}, Lora(rank=4, alpha=8), TARGETS, ["old"], merge=True)
    move(policy)
    held = weights(policy)
    with policy.use("old"):
        used = outputs(transformer)
        with torch.enable_grad(), policy.use("old"):
            assert torch.equal(outputs(transformer), used)
            assert not torch.is_grad_enabled()
        assert torch.equal(outputs(transformer), used)
    assert same(weights(policy), held)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 1.0])
def test_a_copy_follows_by_exactly_its_decay(transformer: Any, decay: float):
    policy = tuned(transformer, "full", "old")
    start = {name: p.detach().clone() for name, p in policy.trained().items()}
    move(policy)
    policy.follow("old", decay)
    for name, live in policy.trained().items():
        copy = policy.copies["old"][name.replace(".", "/")]
        expected = decay * start[name] + (1 - decay) * live
        assert torch.allclose(copy, expected, atol=1e-6)
        if decay in (0.0, 1.0):
            assert torch.equal(copy, live.detach() if decay == 0 else start[name])


def test_copy_into_live_makes_the_copy_the_network(transformer: Any):
    policy = tuned(transformer, "lora", "old")
    start = outputs(transformer)
    move(policy)
    policy.copy_into_live("old")
    assert torch.equal(outputs(transformer), start)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpoint_keys_are_the_trained_parameters_and_the_copies(transformer: Any, kind: str):
    policy = tuned(transformer, kind, "old")
    kept = policy.checkpoint_keys()
    assert kept <= policy.state_dict().keys()
    assert len(kept) == 2 * len(policy.trained())
    if kind == "lora":
        assert all("lora" in key for key in kept)


def test_the_checkpoint_keys_alone_restore_a_policy(transformer: Any):
    from copy import deepcopy

    fresh = tuned(deepcopy(transformer), "lora", "old")
    policy = tuned(transformer, "lora", "old")
    move(policy)
    policy.follow("old", 0.5)
    held = {key: policy.state_dict()[key] for key in policy.checkpoint_keys()}
    fresh.load_state_dict(held, strict=False)
    assert same(weights(fresh), weights(policy))


def test_the_average_for_evaluation_forgets_faster_at_the_start():
    average = Average(cap=0.9)
    assert [round(average(k), 3) for k in (0, 1, 8, 1000)] == [0.1, 0.182, 0.5, 0.9]
    assert Follow(average).every == "rollout"
    for cap in (-0.1, 1.1):
        with pytest.raises(ValueError, match="cap of an average"):
            Average(cap=cap)


@pytest.mark.parametrize(("arguments", "sentence"), [({"rank": 0}, "at least 1"), ({"dropout": 0.1}, "must be 0")])
def test_adapters_that_cannot_learn_are_refused(arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Lora(**arguments)


def test_a_target_without_layers_is_refused_though_others_have_some(transformer: Any):
    with pytest.raises(ValueError, match=r"has no layer attn.to_kk; did you mean to_k\?"):
        Lora(targets=["attn.to_q", "attn.to_kk"])(transformer, (), "transformer")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_copies_on_the_cpu_stay_there_and_do_the_same(transformer: Any, kind: str):
    from copy import deepcopy

    tune = Lora(rank=4, alpha=8) if kind == "lora" else Full()
    policies = [
        Policy({"transformer": deepcopy(transformer)}, tune, TARGETS, ["old"], place) for place in ("same", "cpu")
    ]
    for policy in policies:
        move(policy)
        policy.follow("old", 0.3)
        move(policy, 0.2)
    assert same(weights(policies[0]), weights(policies[1]))
    for policy in policies:
        with policy.use("old"):
            pass
        policy.to("meta")
    held = [{p.device.type for p in policy.copies.parameters()} for policy in policies]
    assert held == [{"meta"}, {"cpu"}]


def test_an_unknown_place_for_copies_is_refused(transformer: Any):
    with pytest.raises(ValueError, match="same"):
        Policy({"transformer": transformer}, Full(), TARGETS, [], "gpu")  # type: ignore[arg-type]


def test_a_pinned_copy_has_the_same_values_in_the_same_parameters(monkeypatch: pytest.MonkeyPatch):
    """Without CUDA pinning is only simulated."""
    locked: list[Tensor] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda t: any(t.data_ptr() == other.data_ptr() for other in locked))
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: locked.append(t.clone()) or locked[-1])
    copy = FrozenCopy({"a.b": nn.Parameter(torch.arange(3.0)), "c": nn.Parameter(torch.ones(2, 2))}, "cpu")
    before = list(copy.values())
    for _ in range(2):
        copy.pin()
    assert len(locked) == 2
    assert all(now is then and now.is_pinned() for now, then in zip(copy.values(), before, strict=True))
    assert copy["a/b"].tolist() == [0, 1, 2]
    assert copy["c"].sum() == 4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_snapshot_is_used_like_any_copy_and_is_in_no_state(transformer: Any, kind: str):
    policy = tuned(transformer, kind, "reference")
    start, keys = outputs(transformer), policy.state_dict().keys()
    policy.take_snapshot("start")
    move(policy)
    moved, before = outputs(transformer), weights(policy)
    with policy.use("start"):
        assert torch.equal(outputs(transformer), start)
    assert torch.equal(outputs(transformer), moved)
    assert same(weights(policy), before)
    assert policy.state_dict().keys() == keys
    policy.drop_snapshot("start")
    policy.drop_snapshot("reference")
    with pytest.raises(KeyError), policy.use("start"):
        pass
    with policy.use("reference"):
        assert torch.equal(outputs(transformer), start)


def test_an_average_at_an_interval_is_the_reference_one(golden: Callable[..., Any], agrees: Callable[..., bool]):
    """Flow-GRPO's average, which is called after every step and updates after every eighth."""
    d = golden("decay_schedules")
    assert [Average()(k) for k in d["steps"].tolist()] == pytest.approx(d["ema_decay_0p9"].tolist(), rel=1e-12)
    follow, ema = Follow(Average(), every="step", interval=8), torch.zeros(3, dtype=torch.float64)
    for k, live, theirs in zip(
        d["ema_steps"].tolist(), d["ema_params"].double(), d["ema_trace_interval8"], strict=True
    ):
        if follow.due("step", k):
            ema = torch.lerp(live, ema, follow.decay(k))
        assert agrees(ema, theirs.double(), 1e-6)
    assert not follow.due("rollout", 7)
    assert not Follow(Decay(0), "step", interval=2).stays_live(1)
    with pytest.raises(ValueError, match="need every=step"):
        Follow(Average(), every="rollout", interval=8)
