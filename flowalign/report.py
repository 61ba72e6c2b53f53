"""Progress reports of the module, for progress bars and profilers."""

from __future__ import annotations


class Report:
    """Progress interface that does nothing; callbacks/progress.py and callbacks/profiler.py override it."""

    def begin(self, phase: str, total: int) -> None:
        """Begin a phase of `total` units of work: "encode", "rollout", "frozen", "optimise" or "evaluate"."""

    def advance(self, phase: str, done: int, **values: float) -> None:
        """Report that `done` units are finished, with values to show beside the bar."""

    def end(self, phase: str) -> None:
        """End a phase."""
