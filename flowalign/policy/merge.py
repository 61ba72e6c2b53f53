"""Adapters merged into the base weights while nothing is trained: a forward pass then costs what the base's does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flowalign.models.quantised import is_quantised
from flowalign.tensors import is_sharded


def adapter_layers(network: nn.Module) -> list[Any]:
    """The peft layers that have adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


def can_merge(network: nn.Module) -> bool:
    """Whether merging is accurate and possible: not for 16-bit, quantised or sharded weights."""
    weights = [layer.get_base_layer().weight for layer in adapter_layers(network)]
    return bool(weights) and all(
        w.dtype == torch.float32 and not is_sharded(w) and not is_quantised(w) for w in weights
    )


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Within this context, adapters are merged into the base weights; the original tensors are restored on exit.

    Takes the memory of the adapted weights once more. Parameters stay the same objects, so compiled code stays valid.
    """
    layers = [(layer, layer.get_base_layer().weight) for layer in adapter_layers(network)]
    base = [weight.data for _, weight in layers]
    try:
        for layer, weight in layers:
            weight.data = weight.data + layer.get_delta_weight("default")
            layer.merged_adapters.append("default")
        yield
    finally:
        for (layer, weight), data in zip(layers, base, strict=True):
            weight.data = data
            layer.merged_adapters.clear()
