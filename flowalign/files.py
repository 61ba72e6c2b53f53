"""Files and folders that are whole or absent: what replaces another one is made beside it and then takes its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

PARTIAL = ".partial"


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
        take_place(partial, target)
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


def take_place(partial: Path, target: Path) -> None:
    """A file replaces a file in one move. Where either is a folder it takes two, between which the old one waits under
    a name of its own."""
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
    """A file or a folder, or nothing."""
    if path.is_file():
        path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path) -> None:
    """Puts back what a kill between those two moves left waiting, and removes what it left behind after them."""
    for waiting in sorted(folder.glob(".*.old")):
        target = waiting.with_name(waiting.name.removeprefix(".").removesuffix(".old"))
        if target.exists():
            _remove(waiting)
        else:
            with suppress(FileNotFoundError):  # another rank was quicker
                os.rename(waiting, target)


def _sync_folder(folder: Path) -> None:
    # The new name itself must survive a power cut. Some network file systems cannot sync a folder; they need not.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
