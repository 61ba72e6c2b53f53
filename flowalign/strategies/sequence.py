"""Sequence parallelism: some ranks in a row work on the same samples, each on a part of every sequence.

The plan of where to split and where to gather is diffusers', of the classes that have one; attention exchanges heads
for tokens between the ranks (Ulysses).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from flowalign.checks.errors import ConfigError


def split_sequence(denoisers: Sequence[nn.Module], context: int, device_type: str) -> None:
    """Lets `context` neighbouring ranks share the sequences of these sharded denoisers."""
    from diffusers import ContextParallelConfig

    for denoiser in denoisers:
        _check(denoiser, context)
    world = dist.get_world_size()
    mesh = init_device_mesh(device_type, (world // context, 1, context), mesh_dim_names=("data", "ring", "ulysses"))
    for denoiser in denoisers:
        denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=context, mesh=mesh))  # type: ignore


def _check(denoiser: Any, context: int) -> None:
    name = type(denoiser).__mro__[1].__name__  # sharded, it is of a class of its own
    if getattr(denoiser, "_cp_plan", None) is None:
        raise ConfigError(
            f"diffusers has no plan for splitting the sequences of {name}: use strategy=fsdp, and "
            "running.gradient_checkpointing=true if memory is short."
        )
    if heads := denoiser.config.get("num_attention_heads"):
        if heads % context:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            nearest = min(fits, key=lambda n: (abs(n - context), -n))
            raise ConfigError(
                f"the {heads} attention heads of {name} cannot be dealt to trainer.strategy.context={context} ranks: "
                f"the nearest possible number is {nearest}."
            )
