"""Dispatch of requests to replicas of a service, shared by the threads that send them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class RefusedError(Exception):
    """A failed attempt or an unusable answer. The request goes to another replica or is retried."""


class BusyError(RefusedError):
    """The replica is at capacity, which does not count as a failure. `seconds`: when to try again."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class ForbiddenError(RefusedError):
    """The replica rejects our credentials."""


class InvalidRequestError(RefusedError):
    """The request itself is at fault: no replica would answer it, so it is not retried."""


@dataclass(eq=False)
class Request:
    """A request: `body` is called on the thread that sends it, `read` parses the answer or raises `RefusedError`."""

    path: str
    body: Callable[[], bytes]
    read: Callable[[bytes], Any]
    result: Any = None
    reason: str = ""
    """Why there is no result; empty while one is still possible."""
    last_error: str = ""
    """Of the last attempt."""
    tries: int = 0
    started: float = 0.0
    failed_at: set[str] = field(default_factory=set)
    """URLs of the replicas at which it failed."""


class ReplicaState(Protocol):
    """What the dispatcher tracks of a replica."""

    url: str
    failures: int
    """Consecutive failures; those of concurrent requests count once."""
    failed_last: float
    backoff_until: float
    """Both in seconds of the monotonic clock."""


class Dispatcher:
    """Hands out requests until each has a result or a reason, all replicas have been given up, or time is up.

    A failed request goes to replicas at which it has not failed yet. One at which it has failed takes it again only if
    none of the others is likely to.
    """

    def __init__(
        self, requests: Sequence[Request], replicas: Sequence[ReplicaState], retries: int, deadline: float
    ) -> None:
        self.queue, self.pending = list(requests), set(requests)
        self.replicas, self.retries, self.deadline = replicas, retries, deadline
        self.idle_threads = dict.fromkeys((replica.url for replica in replicas), 0)
        """Number of idle threads, by URL of the replica."""
        self.error: Exception | None = None
        self.changed = threading.Condition()

    def take(self, replica: ReplicaState) -> Request | None:
        """Wait for the next request for a replica that is not backing off. None when there is nothing left to do."""
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

    def postpone(self, request: Request, replica: ReplicaState, reason: str, delay: float) -> None:
        """Requeue a request that a busy replica refused. delay: seconds for which the replica is left alone."""
        with self.changed:
            request.last_error = reason
            self._back_off(replica, delay)
            self._requeue(request)

    def fail(self, request: Request, replica: ReplicaState, reason: str, delay: float) -> None:
        """Like `postpone`, but count a failure of both request and replica, and give up after too many."""
        with self.changed:
            if request.started > replica.failed_last:
                replica.failures, replica.failed_last = replica.failures + 1, time.monotonic()
            request.tries, request.last_error = request.tries + 1, reason
            request.failed_at.add(replica.url)
            self._back_off(replica, delay)
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
        """Stop everything after an error in this program; `wait` raises it."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def wait(self) -> None:
        """Wait until every request has a result or a reason, at most until the deadline."""
        with self.changed:
            while self._active():
                self.changed.wait(self.deadline - time.monotonic())
            for request in list(self.pending):
                before = f"; before that {request.last_error}" if request.last_error else ""
                self._give_up([request], f"no answer in time{before}")
            if self.error is not None:
                raise self.error

    def close(self) -> None:
        """End all threads that wait in `take`."""
        with self.changed:
            self.deadline = 0.0
            self.changed.notify_all()

    def _active(self) -> bool:
        return bool(self.pending) and self.error is None and time.monotonic() < self.deadline

    def _given_up(self, replica: ReplicaState) -> bool:
        return replica.failures > self.retries

    def _next(self, replica: ReplicaState, now: float) -> Request | None:
        available = {r.url for r in self.replicas if self._is_available(r, now)}
        return next((r for r in self.queue if replica.url not in r.failed_at or available <= r.failed_at), None)

    def _is_available(self, replica: ReplicaState, now: float) -> bool:
        """Whether the replica will likely take a request that failed elsewhere: it is idle, or without failures."""
        free = replica.backoff_until <= now and self.idle_threads[replica.url] > 0
        return not self._given_up(replica) and (free or replica.failures == 0)

    def _seconds_to_next_change(self, now: float) -> float:
        """Seconds until the deadline or the end of a back-off, neither of which notifies `changed`."""
        back_offs = [r.backoff_until for r in self.replicas if r.backoff_until > now]
        return max(min([self.deadline, *back_offs]) - now, 0) + 1e-3

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
