"""Checkpoints as folders: every rank writes its shards, and a small file with the rest comes last.

A folder is made beside its place and then takes it, so that what carries the name is complete. It holds torch's
distributed format (`*.distcp`, `.metadata`) and `meta.pt`: the checkpoint as Lightning knows it, but for the tensors of
`state_dict` and `optimizer_states`, which are meta tensors there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from flowalign.files import PARTIAL, take_place
from flowalign.tensors import KeyPath, join_tensors, split_tensors

META = "meta.pt"
SHARDED = ("state_dict", "optimizer_states")
"""The parts of a checkpoint whose tensors lie in shards."""


def is_folder(path: str | Path) -> bool:
    """Whether a complete checkpoint of this kind is there."""
    return (Path(path) / META).is_file()


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, Tensor]]:
    """A checkpoint with meta tensors for those that may lie in shards, and these tensors by place."""
    frame, tensors = split_tensors({key: checkpoint[key] for key in SHARDED if key in checkpoint})
    return {**checkpoint, **frame}, tensors


def joined(frame: dict[str, Any], tensors: dict[KeyPath, Tensor]) -> dict[str, Any]:
    """The inverse."""
    return {**frame, **join_tensors({key: frame[key] for key in SHARDED if key in frame}, tensors)}


def write(checkpoint: dict[str, Any], target: Path, first: bool) -> None:
    """Every rank calls it with its own shards; `first` is true on rank 0."""
    frame, tensors = split(checkpoint)
    partial = target.with_name(f".{target.name}{PARTIAL}")
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save({_key(place): t for place, t in tensors.items()}, checkpoint_id=partial)
    if first:
        with (partial / META).open("wb") as file:
            torch.save(frame, file)
            file.flush()
            os.fsync(file.fileno())
        take_place(partial, target)
    dist.barrier()


def frame_of(folder: Path) -> dict[str, Any]:
    """The checkpoint without the tensors that lie in shards."""
    return torch.load(folder / META, map_location="cpu", weights_only=True)


def fill(folder: Path, targets: dict[KeyPath, Tensor], alone: bool = False) -> None:
    """Reads into these tensors, each rank its own part; alone=True works without the others."""
    dcp.load({_key(place): t for place, t in targets.items()}, checkpoint_id=folder, no_dist=alone)


def opened(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Tensor]]:
    """The frame of a checkpoint of either kind, and its tensors if it is a file; those of a folder are for `fill`."""
    if is_folder(path):
        return frame_of(path), {}
    return split(torch.load(path, mmap=True, map_location="cpu", weights_only=True))


def read(path: str | Path) -> dict[str, Any]:
    """A whole checkpoint of either kind in one process. Nothing but tensors and plain values is unpickled."""
    path = Path(path)
    if not is_folder(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    frame = frame_of(path)
    tensors = {place: torch.empty(t.shape, dtype=t.dtype) for place, t in split(frame)[1].items()}
    fill(path, tensors, alone=True)
    return joined(frame, tensors)


def _key(place: KeyPath) -> str:
    return "/".join(map(str, place))
