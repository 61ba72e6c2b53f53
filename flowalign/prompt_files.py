"""Prompt files: lines of text, JSON objects, or the rows of a table."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One prompt. metadata: the other keys of its line, for the rewards. source: "file:line", or "file:number"."""

    text: str
    negative: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def tag(self) -> str | None:
        """Its category in evaluations."""
        return None if (tag := self.metadata.get("tag")) is None else str(tag)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read the prompts of a file, in order.

    .txt has one prompt per line. The others have one object per line (.jsonl), list element (.json, where it may also
    be a text) or row (.csv and .tsv, with a header), with `prompt`, optionally `negative_prompt`, and metadata. Empty
    lines and cells are skipped. An invalid entry raises ValueError "file:line: reason".
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: prompts are read from {KINDS} files")
    entries, parse = FORMATS[path.suffix]
    prompts = []
    for source, entry in entries(path):
        try:
            prompts.append(parse(entry, source))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: no prompt in this file")
    return prompts


def read_table(path: Path, check: Callable[[list[str]], T]) -> tuple[T, list[tuple[str, dict[str, str]]]]:
    """What `check` makes of the columns of a .csv or .tsv; and "file:line" and the cells of its rows, empty ones
    left out. `check` raises ValueError for a header in which something is missing."""
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            columns = [name.strip() for name in next(reader, [])]
            checked = check(columns)
            for cells in reader:
                source = f"{path}:{reader.line_num}"
                if len(cells) > len(columns):
                    raise ValueError(f"{source}: {len(cells)} cells below a header of {len(columns)}")
                row = zip(columns, (cell.strip() for cell in cells), strict=False)
                rows.append((source, {column: cell for column, cell in row if cell}))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table in UTF-8 ({error})") from error
    return checked, [row for row in rows if row[1]]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    # Not splitlines(), which also splits at rarer separators that prompts scraped from the web contain.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        source = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: this is not UTF-8 ({error.reason}): save the file as UTF-8") from error
        if line:
            yield source, line


def _elements(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        elements = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(elements, list):
        raise ValueError(f"{path}: expected a list of prompts, got {type(elements).__name__}")
    for number, element in enumerate(elements, start=1):
        yield f"{path}:{number}", element


def _rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    def check(columns: list[str]) -> None:
        if "prompt" not in columns:
            raise ValueError(f"{path}:1: the header needs a column `prompt`; got {', '.join(columns) or 'none'}")

    return read_table(path, check)[1]


def _from_text(text: str, source: str) -> Prompt:
    return Prompt(text, source=source)


def _from_json(line: str, source: str) -> Prompt:
    return _from_record(json.loads(line), source)


def _from_element(element: Any, source: str) -> Prompt:
    return _from_record({"prompt": element} if isinstance(element, str) else element, source)


def _from_record(record: Any, source: str) -> Prompt:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if "prompt" not in record:
        raise ValueError(f"a line needs a `prompt`; the keys of this one are: {', '.join(record) or 'none'}")
    text, negative = record.pop("prompt"), record.pop("negative_prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`prompt` must be a non-empty text, got {text!r}")
    if not isinstance(negative, str | None):
        raise ValueError(f"`negative_prompt` must be a text, got {negative!r}")
    if re.search("[\ud800-\udfff]", text + (negative or "")):
        raise ValueError("the text has one half of a pair of characters (\\ud800 to \\udfff), which no encoder reads")
    return Prompt(text, negative, record, source)


FORMATS: dict[str, tuple[Callable[[Path], Iterable[tuple[str, Any]]], Callable[[Any, str], Prompt]]] = {
    ".jsonl": (_lines, _from_json),
    ".json": (_elements, _from_element),
    ".csv": (_rows, _from_record),
    ".tsv": (_rows, _from_record),
    ".txt": (_lines, _from_text),
}
"""Reader and parser by suffix; of several files with the same name, the first kind is taken."""
KINDS = f"{', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}"
