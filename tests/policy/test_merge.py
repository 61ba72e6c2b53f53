"""Merged adapters: the same network up to rounding, and the original weights afterwards."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from flowalign.policy import Lora, Policy
from flowalign.policy.merge import adapter_layers
from tests.policy.test_policy import TARGETS, move, outputs, same, weights


def policy(transformer: nn.Module, merge: bool = True, *copies: str) -> Policy:
    return Policy({"transformer": transformer}, Lora(rank=4, alpha=8), TARGETS, copies, merge=merge)


def test_a_merged_network_differs_by_rounding_and_is_restored_to_the_bit(transformer: Any):
    merging = policy(transformer)
    move(merging)
    apart, held = outputs(transformer), weights(merging)
    storages = [p.data_ptr() for p in merging.parameters()]
    identities = [id(p) for p in merging.parameters()]
    with merging.use(None):
        assert all(layer.merged for layer in adapter_layers(transformer))
        together = outputs(transformer)
        assert [id(p) for p in merging.parameters()] == identities
    assert not torch.equal(together, apart)
    assert (together - apart).abs().max() < 1e-5 * apart.abs().max()
    assert same(weights(merging), held)
    assert [p.data_ptr() for p in merging.parameters()] == storages
    assert torch.equal(outputs(transformer), apart)


def test_a_copy_is_merged_with_its_own_adapters(transformer: Any):
    plain = policy(deepcopy(transformer), False, "old")
    merging = policy(transformer, True, "old")
    for each in (plain, merging):
        move(each)
        each.follow("old", 0.0)
        move(each)
    with plain.use("old"), merging.use("old"):
        expected = outputs(plain.denoisers["transformer"])
        assert (outputs(transformer) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert same(weights(plain), weights(merging))


def test_an_exception_inside_leaves_nothing_merged(transformer: Any):
    merging = policy(transformer)
    move(merging)
    held = weights(merging)
    with pytest.raises(KeyError), merging.use(None):
        raise KeyError
    assert same(weights(merging), held)
    assert not any(layer.merged for layer in adapter_layers(transformer))


def test_weights_of_16_bits_are_not_merged(transformer: Any):
    """The sum would be rounded to 16 bits, and small adapters to nothing."""
    half = policy(transformer.bfloat16())
    assert adapter_layers(transformer)
    assert not half.merge
    with half.use(None):
        assert not any(layer.merged for layer in adapter_layers(transformer))


def test_without_adapters_there_is_nothing_to_merge(transformer: Any):
    from flowalign.policy import Full

    assert not Policy({"transformer": transformer}, Full(), TARGETS, merge=True).merge
