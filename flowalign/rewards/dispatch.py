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


class InvalidRequestError(RefusedError):
    """What is wrong is the request: no replica would answer it, and so none else is asked."""


@dataclass(eq=False)
class Request:
    """One request: its body, made by the thread that sends it, and what reads the answer or raises `RefusedError`."""

    path: str
    body: Callable[[], bytes]
    read: Callable[[bytes], Any]
    result: Any = None
    reason: str = ""
    """Why there is no result; empty while there may be one."""
    last_error: str = ""
    """What went wrong last."""
    tries: int = 0
    started: float = 0.0
    failed_at: set[str] = field(default_factory=set)


class ReplicaState(Protocol):
    """What the dispatcher knows of a replica."""

    url: str
    failures: int
    """In a row; what was under way together counts once."""
    failed_last: float
    backoff_until: float
    """Both by the monotonic clock."""


class Dispatcher:
    """Gives requests out until each has a result or a reason, all replicas are given up, or the time is over.

    A failed request is for the replicas that it has not failed at. The one that failed takes it again only when there is
    little hope in any of those.
    """

    def __init__(
        self, requests: Sequence[Request], replicas: Sequence[ReplicaState], retries: int, until: float
    ) -> None:
        self.queue, self.pending = list(requests), set(requests)
        self.replicas, self.retries, self.until = replicas, retries, until
        self.idle_threads = dict.fromkeys((replica.url for replica in replicas), 0)
        """Threads of each replica that have nothing to do."""
        self.error: Exception | None = None
        self.changed = threading.Condition()

    def take(self, replica: ReplicaState) -> Request | None:
        """The next request for a replica, once there is one and the replica is awake; None when all is over."""
        with self.changed:
            self.idle_threads[replica.url] += 1
            try:
                while self._active() and not self._given_up(replica):
                    now = time.monotonic()
                    if replica.backoff_until <= now and (request := self._next(replica, now)):
                        self.queue.remove(request)
                        request.started = now
                        self.changed.notify_all()
                        return request
                    self.changed.wait(self._seconds_to_next_change(now))
                return None
            finally:
                self.idle_threads[replica.url] -= 1

    def complete(self, request: Request, replica: ReplicaState, result: Any) -> None:
        with self.changed:
            replica.failures = 0
            if request in self.pending:
                request.result = result
                self._finish(request)

    def postpone(self, request: Request, replica: ReplicaState, reason: str, rest: float) -> None:
        """A replica without room: later, or elsewhere. `rest`: seconds for which it is left alone."""
        with self.changed:
            request.last_error = reason
            self._back_off(replica, rest)
            self._requeue(request)

    def fail(self, request: Request, replica: ReplicaState, reason: str, rest: float) -> None:
        """What `postpone` does, but counted."""
        with self.changed:
            if request.started > replica.failed_last:
                replica.failures, replica.failed_last = replica.failures + 1, time.monotonic()
            request.tries, request.last_error = request.tries + 1, reason
            request.failed_at.add(replica.url)
            self._back_off(replica, rest)
            if request.tries > self.retries:
                self._give_up([request], reason)
            else:
                self._requeue(request)
            if all(map(self._given_up, self.replicas)):
                self._give_up(list(self.pending), reason)

    def reject(self, request: Request, reason: str) -> None:
        with self.changed:
            self._give_up([request], reason)

    def abort(self, error: Exception) -> None:
        """A mistake of our own: everything stops and `wait` raises it."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def wait(self) -> None:
        """Returns when every request has a result or a reason, at the latest when the time is over."""
        with self.changed:
            while self._active():
                self.changed.wait(self.until - time.monotonic())
            for request in list(self.pending):
                self._give_up(
                    [request], f"no answer in time{request.last_error and '; before that ' + request.last_error}"
                )
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        """Lets the threads go."""
        with self.changed:
            self.until = 0.0
            self.changed.notify_all()

    def _active(self) -> bool:
        return bool(self.pending) and self.error is None and time.monotonic() < self.until

    def _given_up(self, replica: ReplicaState) -> bool:
        return replica.failures > self.retries

    def _next(self, replica: ReplicaState, now: float) -> Request | None:
        hopes = {r.url for r in self.replicas if self._is_available(r, now)}
        return next((e for e in self.queue if replica.url not in e.failed_at or hopes <= e.failed_at), None)

    def _is_available(self, replica: ReplicaState, now: float) -> bool:
        """Whether an request that failed elsewhere waits for it: it is free, or busy and without trouble so far."""
        free = replica.backoff_until <= now and self.idle_threads[replica.url] > 0
        return not self._given_up(replica) and (free or replica.failures == 0)

    def _seconds_to_next_change(self, now: float) -> float:
        """Seconds until something may be different without anybody saying so."""
        awaking = [r.backoff_until for r in self.replicas if r.backoff_until > now]
        return max(min([self.until, *awaking]) - now, 0) + 1e-3

    def _back_off(self, replica: ReplicaState, seconds: float) -> None:
        replica.backoff_until = max(replica.backoff_until, time.monotonic() + seconds)
        self.changed.notify_all()

    def _requeue(self, request: Request) -> None:
        if request in self.pending:
            self.queue.append(request)
            self.changed.notify_all()

    def _give_up(self, requests: Sequence[Request], reason: str) -> None:
        for request in requests:
            if request in self.pending:
                request.reason = reason
                self._finish(request)

    def _finish(self, request: Request) -> None:
        self.pending.discard(request)
        if request in self.queue:
            self.queue.remove(request)
        self.changed.notify_all()
