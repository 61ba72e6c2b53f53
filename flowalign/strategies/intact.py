"""Check that a checkpoint is complete, harmless and written by flowalign, before anything is built."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from flowalign.checks.errors import ConfigError, one_line
from flowalign.strategies import folders

PARTS = ("state_dict", "optimizer_states", "loops", "flowalign")
INDEX = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout")}
PATHS = {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}
"""What the index of a distributed checkpoint may refer to: classes of two modules, dtypes, paths and NAMES."""


def check_intact(path: str | Path) -> None:
    """Raise ConfigError, with a message that starts with ckpt_path, for a checkpoint that cannot be resumed from.

    A file is read once in full, since torch does not detect flipped bits. Nothing in it is executed.
    """
    path = Path(path)
    try:
        state = _of_folder(path) if folders.is_folder(path) else _of_file(path)
    except ConfigError:
        raise
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"ckpt_path={path} holds more than tensors and plain values, and may be code: it is not opened "
            f"({_first_line(error)})."
        ) from error
    except Exception as error:  # torch has no specific error for damaged files
        raise ConfigError(f"ckpt_path={path} is damaged ({type(error).__name__}: {_first_line(error)}).") from error
    missing = [part for part in PARTS if not isinstance(state, dict) or part not in state]
    if missing:
        raise ConfigError(f"ckpt_path={path} was not written by a run of flowalign: it has no {missing[0]}.")


def _of_file(path: Path) -> Any:
    if not path.stat().st_size:
        raise ConfigError(f"ckpt_path={path} is empty: resume from an earlier checkpoint.")
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"ckpt_path={path} is cut short, or no checkpoint at all.")
    with zipfile.ZipFile(path) as file:
        if changed := file.testzip():
            raise ConfigError(
                f"ckpt_path={path} is damaged: the content of {changed} has changed since it was written."
            )
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _of_folder(path: Path) -> Any:
    with (path / ".metadata").open("rb") as file:
        index = _IndexUnpickler(file).load()  # torch itself unpickles it without restrictions
    for entry in index.storage_data.values():
        part = path / entry.relative_path
        if part.stat().st_size < entry.offset + entry.length:
            raise ConfigError(f"ckpt_path={path} is damaged: {entry.relative_path} is cut short.")
    return folders.read_frame(path)


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of a distributed checkpoint, and rejects every class that it does not need."""

    def find_class(self, module: str, name: str) -> Any:
        path = module in ("pathlib", "pathlib._local") and name in PATHS
        if module in INDEX or module == "torch" or path or (module, name) in NAMES:
            found = super().find_class(module, name)
            ours = isinstance(found, type) and found.__module__ == module and module in INDEX
            if ours or path or isinstance(found, torch.dtype) or (module, name) in NAMES:
                return found
        raise pickle.UnpicklingError(f"it mentions {module}.{name}")


def _first_line(error: BaseException) -> str:
    return one_line(error).split(". ")[0][:120]
