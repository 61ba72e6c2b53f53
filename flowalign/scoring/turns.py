"""Scoring beside sampling: the last batch is scored while the next one is made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

from torch import Tensor

Scores = dict[str, Tensor]
"""(B,) by the name of a reward."""


class Scoring:
    """Scores of a batch that are on their way."""

    def __init__(self, futures: dict[str, Future[Tensor]]) -> None:
        self.futures = futures

    def result(self) -> Scores:
        """The scores, waited for; raises what a reward has raised."""
        return {name: future.result() for name, future in self.futures.items()}

    @property
    def done(self) -> bool:
        """Whether `result` would not wait."""
        return all(future.done() for future in self.futures.values())

    def cancel(self) -> None:
        """Nothing more is begun."""
        for future in self.futures.values():
            future.cancel()


class Turns:
    """Takes batches on their way and hands their scores on in order; at most `ahead` are left waiting.

    Used as a context, it waits for all at the end, and cancels them after an exception.
    """

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.waiting: deque[tuple[Scoring, Callable[[Scores], None]]] = deque()

    def add(self, scoring: Scoring, then: Callable[[Scores], None]) -> None:
        """`then` is called with the scores, now or during a later call, always by the caller's thread."""
        self.waiting.append((scoring, then))
        while self.waiting and (len(self.waiting) > self.ahead or self.waiting[0][0].done):
            self._next()

    def finish(self) -> None:
        """Waits for everything."""
        try:
            while self.waiting:
                self._next()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Forgets everything that waits."""
        for scoring, _ in self.waiting:
            scoring.cancel()
        self.waiting.clear()

    def _next(self) -> None:
        scoring, then = self.waiting.popleft()
        then(scoring.result())

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            self.finish()
        else:
            self.cancel()
