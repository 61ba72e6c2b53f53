"""Summaries and curves of finished runs."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from flowalign.curves import curves


def summary(folder: Path) -> dict[str, Any]:
    """The run's summary.json."""
    return json.loads((folder / "summary.json").read_text())


def finished(folder: Path) -> bool:
    """Whether the run reached its final evaluation."""
    return (folder / "summary.json").is_file() and bool(summary(folder)["final"])


def curve(folder: Path, metric: str) -> dict[int, float]:
    """A metric by epoch, 0 for the baseline."""
    return curves(folder, metric).get(metric, {})


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over runs (n - 1), in percent; a single run has no spread."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"
