"""Atomic checkpoint files.

Lightning's own writer holds the file twice in memory and assembles it in the temporary folder. That is often another
disk, so the final move is a plain copy: if the disk is full or the job is killed meanwhile, the previous file is lost.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from flowalign.checks.errors import RunError
from flowalign.files import atomic_write
from flowalign.strategies import folders


class AtomicCheckpointIO(TorchCheckpointIO):
    """Keeps the previous checkpoint until the next is on disk; use as Trainer(plugins=[AtomicCheckpointIO()])."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None):
        if storage_options is not None or _is_remote(path):  # object stores replace whole objects anyway
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_write(Path(str(path).removeprefix("file://"))) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # On a failed write torch raises a RuntimeError about its archive, with the OSError as context.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            raise RunError(f"{path} could not be written ({reason.strerror}); the previous file is intact.") from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
        """Load a checkpoint file, or assemble a folder of shards."""
        return folders.read(path) if folders.is_folder(path) else super().load_checkpoint(path, *arguments, **settings)


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")
