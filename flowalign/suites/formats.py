"""Readers of the benchmarks' prompt files. A malformed line raises ValueError "file:line: reason"."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from flowalign.prompts import Prompt, read_prompts
from flowalign.rewards.geneval_rules import Task
from flowalign.rewards.ocr import wanted_text


def geneval(path: Path) -> list[Prompt]:
    """One JSON object per line: prompt, tag, include and optionally exclude (GenEval's evaluation_metadata.jsonl)."""
    prompts = read_prompts(path)
    for prompt in prompts:
        try:
            if not Task.from_metadata(prompt.metadata).tag:
                raise ValueError("no `tag`, which names the category")
        except ValueError as error:
            raise ValueError(f"{prompt.source}: {error}") from error
    return prompts


def quoted(path: Path) -> list[Prompt]:
    """One prompt per line, with the text to render in double quotes (Flow-GRPO's OCR prompts)."""
    prompts = read_prompts(path)
    for prompt in prompts:
        try:
            wanted_text(prompt.text, prompt.metadata)
        except ValueError as error:
            raise ValueError(f"{prompt.source}: {error}") from error
    return prompts


def table(path: Path) -> list[Prompt]:
    """A .csv or .tsv with columns Prompts (or Prompt) and Category; or a .txt, one prompt per line, no categories."""
    if path.suffix == ".txt":
        return read_prompts(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            prompts = list(_rows(path, csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: cannot be read as a table in UTF-8 ({error})") from error
    if not prompts:
        raise ValueError(f"{path}: no prompt in this file")
    return prompts


def _rows(path: Path, reader: csv.DictReader[str]) -> Iterator[Prompt]:
    columns = {name.strip().lower(): name for name in reader.fieldnames or []}
    text = columns.get("prompts", columns.get("prompt"))
    if text is None or "category" not in columns:
        raise ValueError(f"{path}:1: the columns must be Prompts and Category; got {', '.join(columns) or 'none'}")
    for row in reader:
        source = f"{path}:{reader.line_num}"
        prompt, category = ((row[column] or "").strip() for column in (text, columns["category"]))
        if not prompt or not category:
            raise ValueError(f"{source}: {'no prompt' if not prompt else f'no category for {prompt!r}'}")
        yield Prompt(prompt, metadata={"tag": category}, source=source)


def category(path: Path) -> list[Prompt]:
    """One prompt per line; the category is the file name without _val (T2I-CompBench)."""
    tag = path.stem.removesuffix("_val")
    return [replace(prompt, metadata={**prompt.metadata, "tag": tag}) for prompt in read_prompts(path)]
