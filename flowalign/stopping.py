"""Signals that ask a run to stop: noticed at once, obeyed where nothing is lost."""

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
PATIENCE = 15.0
"""Seconds that threads of rewards have to end once the run has ended."""


class Stopped(SystemExit):
    """A signal was obeyed. The exit code is 128 + its number, as a shell counts."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        # Lightning's launcher kills the first rank as soon as a process that it has started does not end with 0.
        super().__init__(0 if _started_by_lightning() else 128 + number)


class Requests:
    """What signals have asked this process for.

    Inside `heeded` the handler only takes notes, except of Ctrl-C; elsewhere nothing is lost by an end, and it raises.
    """

    def __init__(self) -> None:
        self._heeded = False
        self._forget()

    def _forget(self) -> None:
        self.number = 0
        self.times = 0
        self._since = math.inf
        self._interrupted = False

    @property
    def age(self) -> float:
        """Seconds since the first one; 0 before it."""
        return max(time.monotonic() - self._since, 0.0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are ours; in any thread but the main one they cannot be, and stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._forget()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install()
        try:
            yield
        finally:
            self._heeded = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def heed(self, heeded: bool) -> None:
        """Whether somebody asks for `number` from time to time. Takes the handlers back from whoever replaced them."""
        self._heeded = heeded
        # Lightning's own handler for SIGTERM broadcasts from inside of it, which locks ranks up.
        if signal.getsignal(signal.SIGUSR1) == self._notice:
            self._install()

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._notice)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.times += 1
        if self.times == 1:
            self.number, self._since = number, time.monotonic()
        if number == signal.SIGINT and self._interrupted:
            os._exit(128 + number)  # somebody insists
        self._interrupted = number == signal.SIGINT
        if number == signal.SIGINT or not self._heeded:
            raise Stopped(number)


asked = Requests()
"""Of this process, as signals are."""


def farewell(stop: Stopped, folder: Path, given: str | None, requeue: bool) -> None:
    """Says how to go on from what is in the output folder, or was `given`; puts a SLURM job back into its queue.

    From here on the process ends within PATIENCE, whatever a thread of a reward is waiting for.
    """
    last = folder / "checkpoints" / "last.ckpt"
    found = last if last.exists() else given
    way = f"go on with ckpt_path={found}" if found else "nothing was saved yet"
    log.warning("stopped by %s: %s", stop.signal.name, way)
    job = slurm_job(os.environ)
    if requeue and job and stop.signal == signal.SIGUSR1 and _is_first_rank():
        _requeue(job)
    timer = threading.Timer(PATIENCE, os._exit, (stop.code,))
    timer.daemon = True
    timer.start()


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """The job of this process as SLURM's commands call it. The number alone may name all jobs of an array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def _is_first_rank() -> bool:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return rank_zero_only.rank == 0  # SLURM_PROCID counts tasks, and one task may have started several ranks


def _requeue(job: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SLURM sends it to what is left of the job; we are about to end
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
    local = os.environ.get("LOCAL_RANK", "0")  # a task of srun may have been told its own number by this name
    return local not in ("0", os.environ.get("SLURM_LOCALID")) and "RANK" not in os.environ
