"""Signs of life of all ranks, and the end of a process whose fellows have died."""

from __future__ import annotations

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
"""Key of the first sentence about a rank that failed."""
Ended = Callable[[], str]
"""What is known for certain of processes that have ended badly: a sentence, or nothing."""


class Heartbeat(threading.Thread):
    """Every rank says in a store of rank 0 that it lives, and rank 0 watches all of them.

    A collective with a dead rank waits for its time-out, half an hour usually; a thread need not. While `judging`, the
    death of a rank ends this process with exit code 1 and one sentence.
    """

    def __init__(self, rank: int, world: int, limit: float, ended: Ended, period: float = 1.0) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.world, self.limit, self.ended, self.period = rank, world, limit, ended, period
        self.judging = False
        self._store: dist.TCPStore | None = None
        self._beats = 0
        self._seen = {other: (b"", time.monotonic()) for other in range(1, world)}

    def connect(self, host: str, broadcast: Callable[[int], int]) -> None:
        """Every rank calls it; `broadcast` tells all what rank 0 gives."""
        wait = timedelta(seconds=self.limit)
        if self.rank == 0:
            self._store = dist.TCPStore(host, 0, None, True, wait, wait_for_workers=False)
        port = broadcast(self._store.port if self._store else 0)
        if self._store is None:
            self._store = dist.TCPStore(host, port, None, False, wait)
        self.start()

    def tell(self, reason: str) -> None:
        """Lets the others know why this rank ends."""
        self.judging = False
        try:
            self._set(REASON, f"rank {self.rank} ({socket.gethostname()}) failed: {reason}")
            if self.rank == 0:
                time.sleep(2 * self.period)  # the store ends with this process
        except RuntimeError:
            log.debug("the store is gone", exc_info=True)

    def run(self) -> None:
        while True:
            time.sleep(self.period)
            try:
                reason = self._look()
            except RuntimeError:  # DistError too
                reason = "rank 0 has died, or cannot be reached"
                time.sleep(2 * self.period)  # it may have ended well, and this rank be about to
                if not self.judging:
                    return
            if reason and self.judging:
                self._end(reason)

    def _look(self) -> str:
        """Beats once; what has happened to another rank, if anything has."""
        assert self._store is not None
        self._beats += 1
        self._set(f"beat{self.rank}", str(self._beats))
        if self._store.check([REASON]):
            return self._store.get(REASON).decode()
        reason = self.ended() or self._silent() if self.rank == 0 and self.judging else ""
        if reason:
            self._set(REASON, reason)
        return reason

    def _silent(self) -> str:
        assert self._store is not None
        now = time.monotonic()
        for other, (beat, since) in self._seen.items():
            key = f"beat{other}"
            new = self._store.get(key) if self._store.check([key]) else b""
            if new != beat:
                self._seen[other] = new, now
            elif now - since > self.limit:
                return f"rank {other} has died, or has not been heard of for {self.limit:g} s"
        return ""

    def judge(self, judging: bool) -> None:
        """Whether the others have to be there from now on."""
        now = time.monotonic()
        self._seen = {other: (beat, now) for other, (beat, _) in self._seen.items()}
        self.judging = judging

    def _set(self, key: str, value: str) -> None:
        assert self._store is not None
        self._store.set(key, value)

    def _end(self, reason: str) -> None:
        log.error("%s: rank %d ends too. The last checkpoint stands: go on with ckpt_path=…", reason, self.rank)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        logging.shutdown()
        if self.rank == 0:
            time.sleep(2 * self.period)  # the others are to read it before the store ends with this process
        os._exit(1)  # the main thread may wait in a collective that never returns
