"""Mean and spread over seeds, as a markdown table: `python bench/results.py outputs/train/*/`."""

from __future__ import annotations

import sys
from pathlib import Path

from runs import spread, summary

ROWS = [
    "test/strict",
    *(f"test/strict/{kind}" for kind in ("single", "two", "counting", "position")),
    "test/quality",
    "test/reward",
    "val/strict",
]


def table(documents: list[dict]) -> str:
    """A table with one row per metric: baseline, final, and the mean change over runs."""
    lines = ["| metric (percent) | baseline | final | change |", "|---|---|---|---|"]
    for key in ROWS:
        before = [d["baseline"][key] for d in documents]
        after = [d["final"][key] for d in documents]
        change = [a - b for a, b in zip(after, before, strict=True)]
        lines.append(f"| `{key}` | {spread(before)} | {spread(after)} | {spread(change)} |")
    return "\n".join(lines)


def main() -> None:
    documents = [summary(Path(folder)) for folder in sys.argv[1:]]
    print(table(documents))
    minutes = [d["train_s"] / 60 for d in documents]
    seeds = ", ".join(str(d["seed"]) for d in documents)
    print(
        f"\nSeeds {seeds}; {documents[0]['epochs']} epochs, {documents[0]['samples']:,} pictures, "
        f"{documents[0]['network_calls']['total']:,} network calls; training took "
        f"{min(minutes):.1f} to {max(minutes):.1f} minutes."
    )


if __name__ == "__main__":
    main()
