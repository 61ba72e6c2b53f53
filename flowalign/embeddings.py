"""Disk cache of encoded prompts: one safetensors file per prompt, verified when it is read."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from flowalign.types import Conditioning

log = logging.getLogger("flowalign")


class Embeddings:
    """A folder of encoded prompts, shared by runs and by the processes of a run. Files are written atomically.

    `encoder` identifies the encoder (model, revision, weights, dtype, length); each has its own files. A file that is
    damaged or does not match its name is reported and written again.
    """

    def __init__(self, folder: str | Path, encoder: str) -> None:
        self.folder = Path(folder).expanduser() / _digest(encoder)[:16]
        self.encoder = encoder

    def read(self, key: tuple[str, ...]) -> Conditioning | None:
        """The row of a prompt; None if there is no file or it is invalid."""
        from safetensors import SafetensorError, safe_open

        file = self._file(key)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            return self._reject(file, str(error))
        if metadata.get("prompt") != json.dumps(key) or metadata.get("encoder") != self.encoder:
            return self._reject(file, "it holds another prompt or another encoder's")
        if metadata.get("digest") != _content_digest(tensors):
            return self._reject(file, "its content has changed")
        return Conditioning(tensors)

    def contains(self, key: tuple[str, ...]) -> bool:
        """Whether there is a file, valid or not."""
        return self._file(key).is_file()

    def write(self, key: tuple[str, ...], row: Conditioning) -> None:
        """Store one row, tensors (1, …)."""
        from safetensors.torch import save_file

        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in row.items()}
        partial = file.with_name(f".{file.name}.{uuid4().hex}")  # process ids are not unique across containers
        metadata = {"prompt": json.dumps(key), "encoder": self.encoder, "digest": _content_digest(tensors)}
        try:
            save_file(tensors, partial, metadata)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def _file(self, key: tuple[str, ...]) -> Path:
        name = _digest(json.dumps(key))
        return self.folder / name[:2] / f"{name[2:40]}.safetensors"

    @staticmethod
    def _reject(file: Path, why: str) -> None:
        log.warning("the cached prompt %s is encoded again: %s", file, why.splitlines()[0])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
