"""One run a folder, as long as the process lives."""

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


def is_of_a_run(folder: Path) -> bool:
    """Whether a run has ever held it."""
    return (folder / NAME).is_file()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, `folder` is this process's: ConfigError if another one has it. The kernel lets go when a process dies."""
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
