"""Shard a denoiser with FSDP2, and send every rank its shards of the weights that rank 0 has read."""

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
    """Apply FSDP2 in place, to each block and to the rest; afterwards every rank has its shards of rank 0's values.

    mesh: (shard,) or (replicate, shard). gather_dtype: type in which weights are gathered, with gradients averaged in
    float32; None for their own type. offload: keep the shards in CPU memory.
    """
    # The warning concerns in-place changes of outputs, which nothing here does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    values = _match_first_rank(denoiser)
    place = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    # Inputs are not cast, since bfloat16 would change a time of 987.3; the Trainer's autocast casts the products.
    # A float32 output of a block would break the next one; of the root, it is what losses are computed from.
    single = torch.float32 if gather_dtype else None
    inner = MixedPrecisionPolicy(gather_dtype, single, cast_forward_inputs=False)
    root = MixedPrecisionPolicy(gather_dtype, single, output_dtype=single, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner, offload_policy=place, reshard_after_forward=True)
    # The root is resharded too: copies are swapped between forward passes, when all weights must be shards.
    fully_shard(denoiser, mesh=mesh, mp_policy=root, offload_policy=place, reshard_after_forward=True)
    _distribute(denoiser, values, device, torch.device("cpu") if offload else device)


def _match_first_rank(denoiser: nn.Module) -> dict[str, Tensor]:
    """Change the parameter types to those of rank 0, and return this rank's values (meta tensors where it read none).

    Raises ConfigError if their names or shapes differ from rank 0's.
    """
    values = {name: p.detach() for name, p in denoiser.named_parameters()}
    broadcast: list[Any] = [{name: (p.shape, p.dtype) for name, p in values.items()}]
    dist.broadcast_object_list(broadcast, src=0)
    expected = broadcast[0]
    differing = sorted(expected.keys() ^ values.keys()) or [n for n, p in values.items() if expected[n][0] != p.shape]
    if differing:
        raise ConfigError(
            f"the ranks have built different networks ({len(differing)} entries differ, first {differing[0]}): every "
            "machine needs the same model and the same versions of diffusers and peft."
        )
    for name, p in denoiser.named_parameters():
        if p.dtype != expected[name][1]:
            p.data = p.data.to(expected[name][1])
    return values


@torch.no_grad()
def _distribute(denoiser: nn.Module, values: dict[str, Tensor], device: torch.device, place: torch.device) -> None:
    """Copy rank 0's values into the shards of all ranks: parameters on `place`, buffers on `device`."""
    if any(p.is_meta for p in denoiser.parameters()):
        denoiser.to_empty(device=place)
        for module in denoiser.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
    for name, p in denoiser.named_parameters():
        local(p).copy_(local(like(values.pop(name), p)))
    for buffer in denoiser.buffers():
        dist.broadcast(torch.view_as_real(buffer) if buffer.is_complex() else buffer, src=0)
