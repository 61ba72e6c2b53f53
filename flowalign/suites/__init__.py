"""Benchmarks by name. To add one, add an entry here, and a reader in formats.py if its prompt files need one."""

from flowalign.prompts import read_prompts
from flowalign.suites import formats
from flowalign.suites.base import Suite, spread

SUITES: dict[str, Suite] = {
    "geneval": Suite(
        formats.geneval,
        ("evaluation_metadata.jsonl",),
        "https://github.com/djghosh13/geneval/tree/main/prompts",
        reward="geneval",
        measure="correct",
        pictures=4,
        title="GenEval's overall score",
    ),
    "ocr": Suite(
        formats.quoted,
        ("test.txt",),
        "https://github.com/yifan123/flow_grpo/tree/main/dataset/ocr",
        reward="ocr",
        mean="pictures",
    ),
    "drawbench": Suite(
        formats.table,
        ("drawbench.csv", "drawbench.tsv", "drawbench.txt"),
        "https://imagen.research.google (DrawBench, as a table with the columns Prompts and Category)",
        reward="clip_score",
        mean="pictures",
    ),
    "t2i_compbench": Suite(
        formats.category,
        ("*_val.txt",),
        "https://github.com/Karine-Huang/T2I-CompBench/tree/main/examples/dataset",
        reward="clip_score",
        pictures=10,
    ),
    "shapes": Suite(
        read_prompts,
        ("test.jsonl",),
        "flowalign/assets/shapes",
        embedded="shapes/test.jsonl",
        reward="shapes",
        measure="strict",
        pictures=4,
    ),
}

__all__ = ["SUITES", "Suite", "spread"]
