"""Summarise an evaluation: means of every measure for every category, and the headline figure of a benchmark."""

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
"""(N,) scores by measure, NaN where an image could not be scored."""


def _members(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """(N,) bool mask of each category, which is the `tag` in a prompt's metadata."""
    tags = [p.tag for p in prompts]
    return {tag: torch.tensor([t == tag for t in tags]) for tag in sorted({t for t in tags if t is not None})}


def summarise(prompts: Sequence[Prompt], scores: Scores) -> dict[str, float]:
    """Means of the scored images, overall and by category, and the fraction that could not be scored, if any."""
    members, summary = _members(prompts), {}
    for name, values in scores.items():
        summary[name] = float(values.nanmean())
        summary |= {f"{name}/{tag}": float(values[mine].nanmean()) for tag, mine in members.items()}
        if missing := int(values.isnan().sum()):
            summary[f"{name}/not_scored"] = missing / len(values)
    return summary


def finite_or_none(value: float) -> float | None:
    """None for NaN and infinities, which JSON lacks."""
    return value if math.isfinite(value) else None


def figure(suite: Suite, prompts: Sequence[Prompt], scores: Scores) -> dict[str, Any]:
    """The headline figure of a benchmark, titled by its own name only if its own measure was used."""
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
    """Rows of category, number of images, means and number of images without a score; the last row is the total."""
    members = _members(prompts)
    rows = []
    for name, mine in (*members.items(), ("all", torch.ones(len(prompts), dtype=torch.bool))):
        values = torch.stack([column[mine] for column in scores.values()])
        missing = int(values.isnan().any(dim=0).sum())
        rows.append([name, int(mine.sum()), *(float(v.nanmean()) for v in values), missing])
    return rows


def _head(scores: Scores) -> list[str]:
    return ["category", "pictures", *scores, "not_scored"]


def write_table(path: Path, prompts: Sequence[Prompt], scores: Scores) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([_head(scores), *_rows(prompts, scores)])


def format_table(prompts: Sequence[Prompt], scores: Scores) -> list[str]:
    """The table as aligned lines of text, without the last column if every image has a score."""
    rows = _rows(prompts, scores)
    last = None if rows[-1][-1] else -1
    cells = [_head(scores), *([f"{c:.4f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    pad = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in cells
    ]
    return ["  ".join(row[:last]) for row in pad]
