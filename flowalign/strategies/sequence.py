"""Sequence parallelism: groups of neighbouring ranks process the same samples, each a part of every sequence.

diffusers' context-parallel plan of the class, where it has one, says where to split and gather; attention exchanges
heads for tokens between the ranks (Ulysses).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flowalign.checks.errors import ConfigError
from flowalign.geometry import nearest_divisor
from flowalign.models.base import FlowModel
from flowalign.size import Size


def split_sequences(model: FlowModel, context: int, device_type: str) -> None:
    """Split the sequences of a model between `context` neighbouring ranks."""
    world = dist.get_world_size()
    mesh = init_device_mesh(device_type, (world // context, 1, context), mesh_dim_names=("data", "ring", "ulysses"))
    model.enable_context_parallel(context, mesh)


def check_plan(denoiser: Any, context: int) -> None:
    """Raise ConfigError for a network whose sequences cannot be split between `context` ranks."""
    name = type(denoiser).__name__
    if getattr(denoiser, "_cp_plan", None) is None:
        raise ConfigError(
            f"diffusers has no plan for splitting the sequences of {name}: use strategy=fsdp, and "
            "running.gradient_checkpointing=true if memory is short."
        )
    heads = denoiser.config.get("num_attention_heads") or context
    if heads % context:
        raise ConfigError(
            f"the {heads} attention heads of {name} cannot be dealt to trainer.strategy.context={context} ranks: the "
            f"nearest possible number is {nearest_divisor(heads, context)}."
        )


def check_tokens(model: FlowModel, sizes: Sequence[Size], context: int) -> None:
    """Raise ConfigError for a size whose tokens cannot be split between `context` ranks."""
    for size in sizes:
        tokens = model.tokens(*size.area)
        if tokens % context:
            raise ConfigError(
                f"the {tokens} tokens of a sample cannot be dealt to trainer.strategy.context={context} ranks: the "
                f"nearest possible number is {nearest_divisor(tokens, context)}."
            )
