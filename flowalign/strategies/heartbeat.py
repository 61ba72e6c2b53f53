"""Heartbeats of all ranks, which end a process when another rank has died."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

log = logging.getLogger("flowalign")

REASON = "reason"
"""Store key of the first reported failure."""
FindFailure = Callable[[], str]
"""Describes a process that is known to have failed, or returns ""."""


class Heartbeat(threading.Thread):
    """A thread in which every rank beats in a store of rank 0, and rank 0 watches all beats.

    A collective with a dead rank blocks until its time-out, usually half an hour; this thread does not. While
    `watching`, the death of any rank ends this process with exit code 1 and one sentence.
    """

    def __init__(self, rank: int, world: int, limit: float, find_failure: FindFailure, period: float = 1.0) -> None:
        """limit: seconds without a beat after which a rank counts as dead; period: seconds between beats."""
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.world, self.limit, self.find_failure, self.period = rank, world, limit, find_failure, period
        self.watching = False
        self._stopped = threading.Event()
        self._store: dist.TCPStore | None = None
        self._beats = 0
        self._last_beats = {other: (b"", time.monotonic()) for other in range(1, world)}

    def connect(self, host: str, broadcast: Callable[[int], int]) -> None:
        """Connect to the store and start; every rank calls this. `broadcast` returns rank 0's argument on all ranks."""
        wait = timedelta(seconds=self.limit)
        if self.rank == 0:
            self._store = dist.TCPStore(host, 0, None, True, wait, wait_for_workers=False)
        port = broadcast(self._store.port if self._store else 0)
        if self._store is None:
            self._store = dist.TCPStore(host, port, None, False, wait)
        self.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Beat no more. A thread that is inside of the store while Python ends would abort the process (SIGABRT)."""
        self._stopped.set()
        self.join(self.limit)

    def report_failure(self, reason: str) -> None:
        """Tell the other ranks why this one ends."""
        self.watching = False
        try:
            self._set(REASON, f"rank {self.rank} ({socket.gethostname()}) failed: {reason}")
            if self.rank == 0:
                time.sleep(2 * self.period)  # the store ends with this process
        except RuntimeError:
            log.debug("the store is gone", exc_info=True)

    def run(self) -> None:
        while not self._stopped.wait(self.period):
            try:
                reason = self._beat()
            except RuntimeError:  # DistError too
                reason = "rank 0 has died, or cannot be reached"
                self._stopped.wait(2 * self.period)  # rank 0 may have finished, with this rank about to
                if not self.watching or self._stopped.is_set():
                    return
            if reason and self.watching:
                self._end(reason)

    def _beat(self) -> str:
        """Beat once. Returns the reported failure of another rank, or ""."""
        assert self._store is not None
        self._beats += 1
        self._set(f"beat{self.rank}", str(self._beats))
        if self._store.check([REASON]):
            return self._store.get(REASON).decode()
        reason = self.find_failure() or self._find_silent_rank() if self.rank == 0 and self.watching else ""
        if reason:
            self._set(REASON, reason)
        return reason

    def _find_silent_rank(self) -> str:
        assert self._store is not None
        now = time.monotonic()
        for other, (beat, since) in self._last_beats.items():
            key = f"beat{other}"
            new = self._store.get(key) if self._store.check([key]) else b""
            if new != beat:
                self._last_beats[other] = new, now
            elif now - since > self.limit:
                return f"rank {other} has died, or has not been heard of for {self.limit:g} s"
        return ""

    def watch(self, watching: bool) -> None:
        """Set whether a missing rank counts as dead from now on; silence so far is forgiven."""
        now = time.monotonic()
        self._last_beats = {other: (beat, now) for other, (beat, _) in self._last_beats.items()}
        self.watching = watching

    def _set(self, key: str, value: str) -> None:
        assert self._store is not None
        self._store.set(key, value)

    def _end(self, reason: str) -> None:
        log.error("%s: rank %d exits too. Resume from the last checkpoint with ckpt_path=…", reason, self.rank)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        logging.shutdown()
        if self.rank == 0:
            time.sleep(2 * self.period)  # let the others read it before the store ends with this process
        os._exit(1)  # the main thread may be blocked in a collective that never returns
