"""Sharded tensors, and nested structures of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(t: Tensor) -> bool:
    """Whether each rank holds a part of it."""
    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return t.to_local() if isinstance(t, DTensor) else t  # type: ignore[return-value]


def full_tensor(t: Tensor) -> Tensor:
    """The full tensor. Collective if it is sharded."""
    if not isinstance(t, DTensor):
        return t
    # Shards offloaded to the CPU are gathered on the device of the process group.
    return t.to(t.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def like(t: Tensor, target: Tensor) -> Tensor:
    """t in the layout and on the device of `target`. Collective if `target` is sharded.

    The value then comes from the first rank of the mesh; the other ranks may pass a meta tensor.
    """
    if not isinstance(target, DTensor):
        return t
    mesh = target.device_mesh
    t = torch.empty_like(t, device=mesh.device_type) if t.is_meta else t.to(mesh.device_type)
    return distribute_tensor(t.contiguous(), mesh, target.placements).to(target.device)


KeyPath = tuple[str | int, ...]
"""The keys that lead to a value in a nested structure."""


def split_tensors(nest: Any, path: KeyPath = ()) -> tuple[Any, dict[KeyPath, Tensor]]:
    """Replace the tensors of nested dicts and lists by meta tensors; return the result, and the tensors by key path.

    0-d tensors stay: an optimiser counts its steps in them.
    """
    if isinstance(nest, Tensor) and nest.ndim:
        return torch.empty(nest.shape, dtype=nest.dtype, device="meta"), {path: nest}
    if not isinstance(nest, (Mapping, list, tuple)):
        return nest, {}
    items = nest.items() if isinstance(nest, Mapping) else enumerate(nest)
    parts = {key: split_tensors(value, (*path, key)) for key, value in items}
    tensors = {key_path: t for _, inner in parts.values() for key_path, t in inner.items()}
    frame = {key: inner for key, (inner, _) in parts.items()}
    return (frame if isinstance(nest, Mapping) else type(nest)(frame.values())), tensors


def join_tensors(frame: Any, tensors: Mapping[KeyPath, Tensor], path: KeyPath = ()) -> Any:
    """The inverse of `split_tensors`. A key path without a tensor keeps its meta tensor."""
    if isinstance(frame, Tensor):
        return tensors.get(path, frame)
    if isinstance(frame, Mapping):
        return {key: join_tensors(value, tensors, (*path, key)) for key, value in frame.items()}
    if isinstance(frame, (list, tuple)):
        return type(frame)(join_tensors(value, tensors, (*path, i)) for i, value in enumerate(frame))
    return frame


def gather_to_cpu(nest: Any, keep: bool) -> Any:
    """The nested structure with full tensors on the CPU, gathered one by one; None without `keep`. Collective."""
    frame, tensors = split_tensors(nest)
    gathered: dict[KeyPath, Tensor] = {}
    for key_path, t in tensors.items():
        full = full_tensor(t)
        if keep:
            gathered[key_path] = full.detach().cpu()
    return join_tensors(frame, gathered) if keep else None
