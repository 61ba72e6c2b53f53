"""Signals that ask a run to stop: recorded at once, and acted on where nothing is lost."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

log = logging.getLogger("flowalign")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_TIMEOUT = 15.0
"""Seconds that threads of rewards have to end once the run has ended."""


class Stopped(SystemExit):
    """Raised to stop on a signal. The exit code is 128 + its number, as in shells."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        # Lightning's launcher kills the first rank as soon as a process that it started exits with another code than 0.
        super().__init__(0 if _started_by_lightning() else 128 + number)


class Requests:
    """The stop signals that this process has received.

    While polled (see `set_polled`), the handler only records a signal, except Ctrl-C, which raises Stopped; otherwise
    nothing is lost by stopping, and every signal raises it.
    """

    def __init__(self) -> None:
        self._polled = False
        self._reset()

    def _reset(self) -> None:
        self.number = 0
        self.times = 0
        self._since = math.inf
        self._interrupted = False

    @property
    def age(self) -> float:
        """Seconds since the first signal; 0 before it."""
        return max(time.monotonic() - self._since, 0.0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Install the handlers and restore the previous ones on exit; outside the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._reset()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install()
        try:
            yield
        finally:
            self._polled = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def set_polled(self, polled: bool) -> None:
        """Set whether `number` is checked regularly, and reinstall handlers that were replaced."""
        self._polled = polled
        # Lightning replaces that for SIGTERM by one that broadcasts inside the handler, which deadlocks ranks.
        if signal.getsignal(signal.SIGUSR1) == self._handle:
            self._install()

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.times += 1
        if self.times == 1:
            self.number, self._since = number, time.monotonic()
        if number == signal.SIGINT and self._interrupted:
            os._exit(128 + number)  # a second Ctrl-C in a row
        self._interrupted = number == signal.SIGINT
        if number == signal.SIGINT or not self._polled:
            raise Stopped(number)


stop_requests = Requests()
"""The one instance, since signals are per process."""


def wind_down(stop: Stopped, folder: Path, given: str | None, requeue: bool) -> None:
    """Log how to resume, from the output folder or from `given`; requeue the SLURM job if `requeue`.

    The process then exits within EXIT_TIMEOUT, even if a reward's thread is still blocked.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if given == "auto":  # which finds only that file
        given = None
    found = last if last.exists() else given
    hint = f"go on with ckpt_path={found}" if found else "nothing was saved yet"
    log.warning("stopped by %s: %s", stop.signal.name, hint)
    job = slurm_job(os.environ)
    if requeue and job and stop.signal == signal.SIGUSR1 and _is_first_rank():
        _requeue(job)
    timer = threading.Timer(EXIT_TIMEOUT, os._exit, (stop.code,))
    timer.daemon = True
    timer.start()


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The id of this process's job for SLURM's commands; with the task in an array, or it could name all its jobs."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def _is_first_rank() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return rank_zero_only.rank == 0  # SLURM_PROCID counts tasks, and one task may have started several ranks


def _requeue(job: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to the rest of the job; this process is ending
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        failure = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        log.error("job %s could not be put back into the queue: %s", job, failure)
    else:
        log.warning("job %s is back in the queue", job)


def _started_by_lightning() -> bool:
    local = os.environ.get("LOCAL_RANK", "0")  # a task of srun may have its own number in this variable
    return local not in ("0", os.environ.get("SLURM_LOCALID")) and "RANK" not in os.environ
