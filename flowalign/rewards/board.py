"""Requests that wait for an answer, shared by the threads that carry them to replicas."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class RefusedError(Exception):
    """An answer that does not count. The request goes to another replica, or is made again."""


class BusyError(RefusedError):
    """The replica has no room now; that is no failure. `seconds`: when to come back."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class ForbiddenError(RefusedError):
    """The replica does not know us."""


class HopelessError(RefusedError):
    """What is wrong is the request: no replica would answer it, and so none else is asked."""


@dataclass(eq=False)
class Errand:
    """One request: its body, made by the thread that carries it, and what reads the answer or raises `RefusedError`."""

    path: str
    body: Callable[[], bytes]
    read: Callable[[bytes], Any]
    result: Any = None
    reason: str = ""
    """Why there is no result; empty while there may be one."""
    trouble: str = ""
    """What went wrong last."""
    tries: int = 0
    begun: float = 0.0
    failed_at: set[str] = field(default_factory=set)


class Carrier(Protocol):
    """What the board knows of a replica."""

    url: str
    failures: int
    """In a row; what was under way together counts once."""
    failed_last: float
    rests_until: float
    """Both by the monotonic clock."""


class Board:
    """Gives errands out until each has a result or a reason, all replicas are given up, or the time is over.

    A failed errand is for the replicas that it has not failed at. The one that failed takes it again only when there is
    little hope in any of those.
    """

    def __init__(self, errands: Sequence[Errand], replicas: Sequence[Carrier], retries: int, until: float) -> None:
        self.waiting, self.unsettled = list(errands), set(errands)
        self.replicas, self.retries, self.until = replicas, retries, until
        self.idle = dict.fromkeys((replica.url for replica in replicas), 0)
        """Threads of each replica that have nothing to do."""
        self.error: Exception | None = None
        self.changed = threading.Condition()

    def take(self, replica: Carrier) -> Errand | None:
        """The next errand for a replica, once there is one and the replica is awake; None when all is over."""
        with self.changed:
            self.idle[replica.url] += 1
            try:
                while self._goes_on() and not self._given_up(replica):
                    now = time.monotonic()
                    if replica.rests_until <= now and (errand := self._next(replica, now)):
                        self.waiting.remove(errand)
                        errand.begun = now
                        self.changed.notify_all()
                        return errand
                    self.changed.wait(self._pause(now))
                return None
            finally:
                self.idle[replica.url] -= 1

    def settle(self, errand: Errand, replica: Carrier, result: Any) -> None:
        with self.changed:
            replica.failures = 0
            if errand in self.unsettled:
                errand.result = result
                self._done(errand)

    def postpone(self, errand: Errand, replica: Carrier, reason: str, rest: float) -> None:
        """A replica without room: later, or elsewhere. `rest`: seconds for which it is left alone."""
        with self.changed:
            errand.trouble = reason
            self._rest(replica, rest)
            self._again(errand)

    def fail(self, errand: Errand, replica: Carrier, reason: str, rest: float) -> None:
        """What `postpone` does, but counted."""
        with self.changed:
            if errand.begun > replica.failed_last:
                replica.failures, replica.failed_last = replica.failures + 1, time.monotonic()
            errand.tries, errand.trouble = errand.tries + 1, reason
            errand.failed_at.add(replica.url)
            self._rest(replica, rest)
            if errand.tries > self.retries:
                self._give_up([errand], reason)
            else:
                self._again(errand)
            if all(map(self._given_up, self.replicas)):
                self._give_up(list(self.unsettled), reason)

    def dismiss(self, errand: Errand, reason: str) -> None:
        with self.changed:
            self._give_up([errand], reason)

    def broken(self, error: Exception) -> None:
        """A mistake of our own: everything stops and `wait` raises it."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def wait(self) -> None:
        """Returns when every errand has a result or a reason, at the latest when the time is over."""
        with self.changed:
            while self._goes_on():
                self.changed.wait(self.until - time.monotonic())
            for errand in list(self.unsettled):
                self._give_up([errand], f"no answer in time{errand.trouble and '; before that ' + errand.trouble}")
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        """Lets the threads go."""
        with self.changed:
            self.until = 0.0
            self.changed.notify_all()

    def _goes_on(self) -> bool:
        return bool(self.unsettled) and self.error is None and time.monotonic() < self.until

    def _given_up(self, replica: Carrier) -> bool:
        return replica.failures > self.retries

    def _next(self, replica: Carrier, now: float) -> Errand | None:
        hopes = {r.url for r in self.replicas if self._promises(r, now)}
        return next((e for e in self.waiting if replica.url not in e.failed_at or hopes <= e.failed_at), None)

    def _promises(self, replica: Carrier, now: float) -> bool:
        """Whether an errand that failed elsewhere waits for it: it is free, or busy and without trouble so far."""
        free = replica.rests_until <= now and self.idle[replica.url] > 0
        return not self._given_up(replica) and (free or replica.failures == 0)

    def _pause(self, now: float) -> float:
        """Seconds until something may be different without anybody saying so."""
        awaking = [r.rests_until for r in self.replicas if r.rests_until > now]
        return max(min([self.until, *awaking]) - now, 0) + 1e-3

    def _rest(self, replica: Carrier, seconds: float) -> None:
        replica.rests_until = max(replica.rests_until, time.monotonic() + seconds)
        self.changed.notify_all()

    def _again(self, errand: Errand) -> None:
        if errand in self.unsettled:
            self.waiting.append(errand)
            self.changed.notify_all()

    def _give_up(self, errands: Sequence[Errand], reason: str) -> None:
        for errand in errands:
            if errand in self.unsettled:
                errand.reason = reason
                self._done(errand)

    def _done(self, errand: Errand) -> None:
        self.unsettled.discard(errand)
        if errand in self.waiting:
            self.waiting.remove(errand)
        self.changed.notify_all()
