"""What the module tells about its progress, as plain calls that a progress bar may listen to."""

from __future__ import annotations


class Report:
    """Says nothing; callbacks/progress.py listens."""

    def begin(self, phase: str, total: int) -> None:
        """A phase starts, with so many units of work: "encode", "rollout", "frozen", "optimise" or "evaluate"."""

    def advance(self, phase: str, done: int, **values: float) -> None:
        """`done` units are finished; values are shown beside the bar."""

    def end(self, phase: str) -> None:
        """The phase is over."""
