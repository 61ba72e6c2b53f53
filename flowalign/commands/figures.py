"""What an evaluation amounts to: means of every measure for every category, and the one figure of a benchmark."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.suites.base import Suite

Scores = Mapping[str, Tensor]
"""(N,) of every measure, NaN where a picture could not be scored."""


def _members(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """(N,) bool of each category, the `tag` of prompts that have one."""
    tags = [None if (tag := p.metadata.get("tag")) is None else str(tag) for p in prompts]
    return {tag: torch.tensor([t == tag for t in tags]) for tag in sorted({t for t in tags if t is not None})}


def summarised(prompts: Sequence[Prompt], scores: Scores) -> dict[str, float]:
    """Means over what could be scored, of all and of each category; and how much could not."""
    members, summary = _members(prompts), {}
    for name, values in scores.items():
        summary[name] = float(values.nanmean())
        summary |= {f"{name}/{tag}": float(values[mine].nanmean()) for tag, mine in members.items()}
        if missing := int(values.isnan().sum()):
            summary[f"{name}/not_scored"] = missing / len(values)
    return summary


def plain(value: float) -> float | None:
    """As JSON can hold it, which has no NaN."""
    return value if math.isfinite(value) else None


def figure(suite: Suite, prompts: Sequence[Prompt], scores: Scores) -> dict[str, Any]:
    """The figure of a benchmark, by its own name only where its own measure was taken."""
    measure = suite.measure if suite.measure in scores else "reward"
    values, members = scores[measure], _members(prompts)
    if suite.mean == "categories" and members:
        parts = torch.stack([values[mine].nanmean() for mine in members.values()])
        value, mean = parts.mean(), "mean of the categories' means"
    else:
        value, mean = values.nanmean(), "mean of all pictures"
    title = suite.title if suite.title and measure == suite.measure else "score"
    return {"title": title, "value": float(value), "measure": measure, "mean": mean}


def _rows(prompts: Sequence[Prompt], scores: Scores) -> list[list[Any]]:
    """Category, pictures, means, and how many pictures lack a score; all together in the last row."""
    members = _members(prompts)
    rows = []
    for name, mine in (*members.items(), ("all", torch.ones(len(prompts), dtype=torch.bool))):
        values = torch.stack([column[mine] for column in scores.values()])
        missing = int(values.isnan().any(dim=0).sum())
        rows.append([name, int(mine.sum()), *(float(v.nanmean()) for v in values), missing])
    return rows


def _head(scores: Scores) -> list[str]:
    return ["category", "pictures", *scores, "not_scored"]


def written_table(path: Path, prompts: Sequence[Prompt], scores: Scores) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([_head(scores), *_rows(prompts, scores)])


def shown_table(prompts: Sequence[Prompt], scores: Scores) -> list[str]:
    """The same in lines of text; without the last column where nothing lacks a score."""
    rows = _rows(prompts, scores)
    last = None if rows[-1][-1] else -1
    cells = [_head(scores), *([f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in cells
    ]
    return ["  ".join(row[:last]) for row in pad]
