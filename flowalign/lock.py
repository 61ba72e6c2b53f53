"""Lock a run's output folder, so that only one run at a time uses it."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EAGAIN, EWOULDBLOCK
from pathlib import Path

from flowalign.checks.errors import ConfigError

log = logging.getLogger("flowalign")
NAME = ".lock"


def is_run_folder(folder: Path) -> bool:
    """Whether a run has ever locked this folder."""
    return (folder / NAME).is_file()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; ConfigError if another one holds it. The kernel releases it if a process dies."""
    with (folder / NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (EAGAIN, EWOULDBLOCK):
                log.warning("%s cannot be locked (%s): start no second run there.", folder, error.strerror)
            else:
                file.seek(0)
                raise ConfigError(
                    f"{folder} belongs to a run that is still going ({file.read().strip() or 'unknown'}): choose "
                    "another folder with hydra.run.dir=…, or wait for its end."
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
