"""Checkpoints that are whole or absent.

Lightning's own writer keeps the file twice in memory and assembles it in the temporary folder. Often that is another
disk, so the last move is a plain copy: with the disk full, or the job killed meanwhile, it destroys the previous file.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from flowalign.checks.errors import RunError
from flowalign.strategies import folders

PARTIAL = ".partial"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Trainer(plugins=[AtomicCheckpointIO()]): the previous checkpoint stays until the next is safely on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None):
        if storage_options is not None or _is_remote(path):  # an object store replaces whole objects by itself
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(Path(str(path).removeprefix("file://"))) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch complains of a wrong position in its archive instead.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise RunError(f"{path} could not be written ({reason.strerror}): what was there before stands.") from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """Of one process or of many: what ranks have written in shards is put together."""
        return folders.read(path) if folders.is_folder(path) else super().load_checkpoint(path, *arguments, **settings)


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `target` when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        folders.take_place(partial, target)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def sweep(folder: str | Path) -> list[Path]:
    """Remove what killed runs left half written; call it before anything writes there. Returns what was removed."""
    leftovers = sorted(Path(folder).glob(f".*{PARTIAL}"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        leftover.unlink(missing_ok=True)
    return leftovers


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def _sync_folder(folder: Path) -> None:
    # The new name itself must survive a power cut. Some network file systems cannot sync a folder; they need not.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
