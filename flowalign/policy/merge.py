"""Adapters folded into the weights that they adapt, for as long as nothing is trained: the base's cost a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flowalign.models.quantised import is_quantised
from flowalign.tensors import is_sharded


def adapted(network: nn.Module) -> list[Any]:
    """The layers that have adapters, peft's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


def can_merge(network: nn.Module) -> bool:
    """Whether a merged weight would say what both say: not in 16 bits, not of quantised weights, not of shards."""
    weights = [layer.get_base_layer().weight for layer in adapted(network)]
    return bool(weights) and all(
        w.dtype == torch.float32 and not is_sharded(w) and not is_quantised(w) for w in weights
    )


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Inside, base weights are those of base and adapter together; afterwards the very tensors from before.

    Costs the memory of the adapted weights once more. Parameters keep their identity, and compiled code its guards.
    """
    held = [(layer, layer.get_base_layer().weight) for layer in adapted(network)]
    base = [weight.data for _, weight in held]
    try:
        for layer, weight in held:
            weight.data = weight.data + layer.get_delta_weight("default")
            layer.merged_adapters.append("default")
        yield
    finally:
        for (layer, weight), data in zip(held, base, strict=True):
            weight.data = data
            layer.merged_adapters.clear()
