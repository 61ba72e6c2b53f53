"""Atomic replacement of files and folders: write the new one under a temporary name, then rename it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

PARTIAL = ".partial"
WAITING = ".*.ckpt.old"
"""Names of checkpoints that are being replaced. Other files called .old, which are the user's, are left alone."""


@contextmanager
def atomic_write(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `target` when the block succeeds and is deleted when it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex[:8]}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(partial, target)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def remove_partials(folder: str | Path) -> list[Path]:
    """Delete and return what killed runs left incomplete; call this before anything is written there."""
    leftovers = sorted(Path(folder).glob(f".*{PARTIAL}"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        leftover.unlink(missing_ok=True)
    return leftovers


def replace(partial: Path, target: Path) -> None:
    """Replace a file by a file in one rename. If either is a folder it takes two renames, between which the old one has
    a name that `restore` recognises."""
    if not (partial.is_dir() or target.is_dir()):
        os.replace(partial, target)
        return
    waiting = target.with_name(f".{target.name}.old")
    if target.exists():
        _remove(waiting)
        os.rename(target, waiting)
    os.rename(partial, target)
    _remove(waiting)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_file():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path) -> None:
    """Undo a checkpoint's replacement that was killed between its two renames, and delete what one killed after them
    left over."""
    for waiting in sorted(folder.glob(WAITING)):
        target = waiting.with_name(waiting.name.removeprefix(".").removesuffix(".old"))
        if target.exists():
            _remove(waiting)
        else:
            with suppress(FileNotFoundError):  # another rank was quicker
                os.rename(waiting, target)


def _sync_folder(folder: Path) -> None:
    # So that the new name survives a power failure. Some network file systems cannot sync a folder, and need not.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
