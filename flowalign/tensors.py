"""One value, whole or in shards, and nests of values with their tensors taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(t: Tensor) -> bool:
    """Whether ranks hold parts of it."""
    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """What this rank holds of it, sharing its memory."""
    return t.to_local() if isinstance(t, DTensor) else t  # type: ignore[return-value]


def full_tensor(t: Tensor) -> Tensor:
    """The full value. For a sharded tensor every rank has to ask."""
    if not isinstance(t, DTensor):
        return t
    # Shards that are offloaded to the CPU meet where the process group works.
    return t.to(t.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def like(t: Tensor, target: Tensor) -> Tensor:
    """t in the layout and on the device of `target`; of a sharded target, the t of the mesh's first rank counts.

    The other ranks may give a meta tensor. Every rank has to ask.
    """
    if not isinstance(target, DTensor):
        return t
    mesh = target.device_mesh
    t = torch.empty_like(t, device=mesh.device_type) if t.is_meta else t.to(mesh.device_type)
    return distribute_tensor(t.contiguous(), mesh, target.placements).to(target.device)


KeyPath = tuple[str | int, ...]
"""The keys that lead to a value."""


def split_tensors(nest: Any, path: KeyPath = ()) -> tuple[Any, dict[KeyPath, Tensor]]:
    """A nest of dicts and lists with meta tensors in place of its tensors, and these tensors by their place.

    Single numbers stay: an optimiser counts its steps in them.
    """
    if isinstance(nest, Tensor) and nest.ndim:
        return torch.empty(nest.shape, dtype=nest.dtype, device="meta"), {path: nest}
    if not isinstance(nest, (Mapping, list, tuple)):
        return nest, {}
    items = nest.items() if isinstance(nest, Mapping) else enumerate(nest)
    parts = {key: split_tensors(value, (*path, key)) for key, value in items}
    tensors = {place: t for _, inside in parts.values() for place, t in inside.items()}
    frame = {key: inner for key, (inner, _) in parts.items()}
    return (frame if isinstance(nest, Mapping) else type(nest)(frame.values())), tensors


def join_tensors(frame: Any, tensors: Mapping[KeyPath, Tensor], path: KeyPath = ()) -> Any:
    """The inverse: `frame` with the tensors in their places; a place without one keeps its meta tensor."""
    if isinstance(frame, Tensor):
        return tensors.get(path, frame)
    if isinstance(frame, Mapping):
        return {key: join_tensors(value, tensors, (*path, key)) for key, value in frame.items()}
    if isinstance(frame, (list, tuple)):
        return type(frame)(join_tensors(value, tensors, (*path, i)) for i, value in enumerate(frame))
    return frame


def gather_to_cpu(nest: Any, keep: bool) -> Any:
    """The nest with whole tensors on the CPU, one after another; a rank that does not keep them gets None for it."""
    frame, tensors = split_tensors(nest)
    made: dict[KeyPath, Tensor] = {}
    for place, t in tensors.items():
        full = full_tensor(t)
        if keep:
            made[place] = full.detach().cpu()
    return join_tensors(frame, made) if keep else None
