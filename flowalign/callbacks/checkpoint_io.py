"""Checkpoints that are whole or absent.

Lightning's own writer keeps the file twice in memory and assembles it in the temporary folder. Often that is another
disk, so the last move is a plain copy: with the disk full, or the job killed meanwhile, it destroys the previous file.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from flowalign.checks.errors import RunError
from flowalign.files import replacing
from flowalign.strategies import folders


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


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")
