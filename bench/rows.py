"""Result rows: a markdown table, and a JSON file that is written after every row."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHES = Path(__file__).parents[1] / "outputs" / "bench"


def place() -> Path:
    """A results folder named after the current time."""
    return BENCHES / time.strftime("%Y-%m-%d_%H-%M-%S")


def cell(value: Any) -> str:
    """Format a value: floats with four digits, None as an empty cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A markdown table whose header is the keys of the first row."""
    if not rows:
        return "nothing was measured"
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cell(row[head]) for head in heads)} |" for row in rows])


class Rows:
    """`rows` of one JSON file. Existing rows are kept, so that a measurement can be resumed."""

    def __init__(self, path: Path, **about: Any) -> None:
        """about: metadata that is written next to the rows."""
        self.path, self.about = path, about
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []

    def has(self, **wanted: Any) -> bool:
        """Whether there is a row with these values that did not fail."""
        return any(not row.get("failed") and wanted.items() <= row.items() for row in self.rows)

    def add(self, row: dict[str, Any], *keys: str) -> None:
        """Add a row and write the file. A row with the same values of `keys`, if any are given, is replaced."""
        same = {key: row[key] for key in keys}
        self.rows = [old for old in self.rows if not (same and same.items() <= old.items())] + [row]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=2) + "\n")
