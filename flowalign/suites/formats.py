"""Readers of the benchmarks' prompt files. A malformed line raises ValueError "file:line: reason"."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flowalign.prompt_files import Prompt, read_prompts, read_table
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

    def wanted(columns: list[str]) -> tuple[str, str]:
        known = {name.lower(): name for name in columns}
        text = known.get("prompts", known.get("prompt"))
        if text is None or "category" not in known:
            raise ValueError(f"{path}:1: the columns must be Prompts and Category; got {', '.join(known) or 'none'}")
        return text, known["category"]

    (text, kind), rows = read_table(path, wanted)
    if not rows:
        raise ValueError(f"{path}: no prompt in this file")
    for source, row in rows:
        if text not in row or kind not in row:
            raise ValueError(f"{source}: {'no prompt' if text not in row else f'no category for {row[text]!r}'}")
    return [Prompt(row[text], metadata={"tag": row[kind]}, source=source) for source, row in rows]


def category(path: Path) -> list[Prompt]:
    """One prompt per line; the category is the file name without _val (T2I-CompBench)."""
    tag = path.stem.removesuffix("_val")
    return [replace(prompt, metadata={**prompt.metadata, "tag": tag}) for prompt in read_prompts(path)]
