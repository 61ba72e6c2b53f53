"""Rows of a measurement: a table in markdown, and a JSON file that is written as soon as a row is known."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHES = Path(__file__).parents[1] / "outputs" / "bench"


def place() -> Path:
    """A folder for the results of this moment."""
    return BENCHES / time.strftime("%Y-%m-%d_%H-%M-%S")


def cell(value: Any) -> str:
    """Four digits of a number, nothing of what was not measured."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table with the keys of the first row as its head."""
    if not rows:
        return "nothing was measured"
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cell(row[head]) for head in heads)} |" for row in rows])


class Rows:
    """`rows` of one JSON file. What an earlier call has left there is kept, so that a measurement can go on."""

    def __init__(self, path: Path, **about: Any) -> None:
        """about: what is written beside the rows."""
        self.path, self.about = path, about
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def has(self, **wanted: Any) -> bool:
        """Whether a row with these values is there and did not fail."""
        return any(not row.get("failed") and wanted.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any], *keys: str) -> None:
        """Instead of the row that is the same in `keys`, if any are given."""
        same = {key: row[key] for key in keys}
        self.rows = [old for old in self.rows if not (same and same.items() <= old.items())] + [row]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=2) + "\n")
