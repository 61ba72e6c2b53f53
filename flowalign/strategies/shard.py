"""Cuts a denoiser into shards, and gives every rank its own of what rank 0 has read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flowalign.checks.errors import ConfigError
from flowalign.tensors import like, local


def shard(
    denoiser: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    gather_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """FSDP2 on each block and on the rest, in place; afterwards every rank has its shards of rank 0's values.

    mesh is (shard,) or (replicate, shard). gather_dtype is what weights are gathered in, None for their own type;
    gradients are averaged in float32 then. offload keeps the shards in the machine's memory.
    """
    # It is about changing an output in place, which nothing here does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    values = _agreed(denoiser)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    # Inputs are left alone, since a time of 987.3 is another one in bfloat16: the Trainer's autocast sees to the
    # products. A float32 output on a block would break the next one, on the root it is what losses are made of.
    single = torch.float32 if gather_dtype else None
    inner = MixedPrecisionPolicy(gather_dtype, single, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(gather_dtype, single, output_dtype=single, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner, offload_policy=place, reshard_after_forward=True)
    # The root lets go of its weights too: copies are exchanged between forward passes, when all must lie in shards.
    fully_shard(denoiser, mesh=mesh, mp_policy=root, offload_policy=place, reshard_after_forward=True)
    _spread(denoiser, values, device, torch.device("cpu") if offload else device)


def _agreed(denoiser: nn.Module) -> dict[str, Tensor]:
    """The parameters of this rank, meta ones where nothing was read; their types follow those of rank 0."""
    values = {name: p.detach() for name, p in denoiser.named_parameters()}
    told: list[Any] = [{name: (p.shape, p.dtype) for name, p in values.items()}]
    dist.broadcast_object_list(told, src=0)
    said = told[0]
    differing = sorted(said.keys() ^ values.keys()) or [n for n, p in values.items() if said[n][0] != p.shape]
    if differing:
        raise ConfigError(
            f"the ranks have built different networks ({len(differing)} entries differ, first {differing[0]}): every "
            "machine needs the same model and the same versions of diffusers and peft."
        )
    for name, p in denoiser.named_parameters():
        if p.dtype != said[name][1]:
            p.data = p.data.to(said[name][1])
    return values


@torch.no_grad()
def _spread(denoiser: nn.Module, values: dict[str, Tensor], device: torch.device, place: torch.device) -> None:
    """Parameters come to rest at `place`, buffers on the device."""
    if any(p.is_meta for p in denoiser.parameters()):
        denoiser.to_empty(device=place)
        for module in denoiser.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
    for name, p in denoiser.named_parameters():
        local(p).copy_(local(like(values.pop(name), p)))
    for buffer in denoiser.buffers():
        dist.broadcast(torch.view_as_real(buffer) if buffer.is_complex() else buffer, src=0)
