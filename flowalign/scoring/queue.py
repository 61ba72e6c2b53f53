"""Overlap of scoring and sampling: one batch is scored while the next one is generated."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

from torch import Tensor

Scores = dict[str, Tensor]
"""Scores (B,) by reward name."""


class PendingScores:
    """The scores of one batch, which may still be computing."""

    def __init__(self, futures: dict[str, Future[Tensor]]) -> None:
        self.futures = futures

    def result(self) -> Scores:
        """Wait for the scores. Reraises the exception of a reward that failed."""
        return {name: future.result() for name, future in self.futures.items()}

    @property
    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(future.done() for future in self.futures.values())

    def cancel(self) -> None:
        """Cancel the rewards that have not started; one that is running is left to finish."""
        for future in self.futures.values():
            future.cancel()


class ScoreQueue:
    """Holds at most `ahead` pending batches and passes their scores on in the order in which they were added.

    As a context manager it waits for all of them on a normal exit, and cancels them after an exception.
    """

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.waiting: deque[tuple[PendingScores, Callable[[Scores], None]]] = deque()

    def add(self, pending: PendingScores, callback: Callable[[Scores], None]) -> None:
        """Queue a batch. `callback` receives its scores in this call or a later one, on the thread that calls."""
        self.waiting.append((pending, callback))
        while self.waiting and (len(self.waiting) > self.ahead or self.waiting[0][0].done):
            self._pop()

    def finish(self) -> None:
        """Wait for every batch."""
        try:
            while self.waiting:
                self._pop()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Drop every waiting batch; their callbacks are not called."""
        for pending, _ in self.waiting:
            pending.cancel()
        self.waiting.clear()

    def _pop(self) -> None:
        pending, callback = self.waiting.popleft()
        callback(pending.result())

    def __enter__(self) -> ScoreQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            self.finish()
        else:
            self.cancel()
