"""Checkpoints as folders: every rank writes its shards, and rank 0 writes a small file with everything else last.

A folder is written under a temporary name and then renamed, so that a folder with the final name is complete. It holds
torch's distributed format (`*.distcp`, `.metadata`) and `meta.pt`: the checkpoint as Lightning knows it, with meta
tensors in place of the tensors of `state_dict` and `optimizer_states`.
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

from flowalign.files import PARTIAL, replace
from flowalign.tensors import KeyPath, join_tensors, split_tensors

META = "meta.pt"
SHARDED = ("state_dict", "optimizer_states")
"""Parts of a checkpoint whose tensors are sharded."""


def is_folder(path: str | Path) -> bool:
    """Whether `path` is a complete checkpoint folder."""
    return (Path(path) / META).is_file()


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[KeyPath, Tensor]]:
    """Split a checkpoint into a frame, with meta tensors for those that may be sharded, and these tensors by place."""
    frame, tensors = split_tensors({key: checkpoint[key] for key in SHARDED if key in checkpoint})
    return {**checkpoint, **frame}, tensors


def join(frame: dict[str, Any], tensors: dict[KeyPath, Tensor]) -> dict[str, Any]:
    """Inverse of `split`."""
    return {**frame, **join_tensors({key: frame[key] for key in SHARDED if key in frame}, tensors)}


def write(checkpoint: dict[str, Any], target: Path, first: bool) -> None:
    """Write a checkpoint folder. Every rank calls this with its own shards; `first` is true on rank 0."""
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
        replace(partial, target)
    dist.barrier()


def read_frame(folder: Path) -> dict[str, Any]:
    """Read the checkpoint without its sharded tensors, which are meta tensors."""
    return torch.load(folder / META, map_location="cpu", weights_only=True)


def read_into(folder: Path, targets: dict[KeyPath, Tensor], alone: bool = False) -> None:
    """Read into these tensors, each rank its own shards; alone=True needs no other ranks."""
    dcp.load({_key(place): t for place, t in targets.items()}, checkpoint_id=folder, no_dist=alone)


def read_split(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Tensor]]:
    """The frame of a file or folder, and the tensors of a file (mapped); read those of a folder with `read_into`."""
    if is_folder(path):
        return read_frame(path), {}
    return split(torch.load(path, mmap=True, map_location="cpu", weights_only=True))


def read(path: str | Path) -> dict[str, Any]:
    """Read a whole checkpoint, file or folder, in one process. Unpickles only tensors and plain values."""
    path = Path(path)
    if not is_folder(path):
        return torch.load(path, map_location="cpu", weights_only=True)
    frame = read_frame(path)
    tensors = {place: torch.empty(t.shape, dtype=t.dtype) for place, t in split(frame)[1].items()}
    read_into(path, tensors, alone=True)
    return join(frame, tensors)


def _key(place: KeyPath) -> str:
    return "/".join(map(str, place))
