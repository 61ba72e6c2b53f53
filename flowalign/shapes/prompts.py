"""Write the prompt files of the scenes world: `python -m flowalign.shapes.prompts FOLDER`.

Each specification has one wording, in rotation; single objects and counts, of which there are few, appear in every
wording. The large kinds are subsampled, so that the files stay small and every kind is well covered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from flowalign.shapes.world import KINDS, SPLITS, Spec, specs

_LIMITS = {
    "train": {"position": 364},
    "val": {"two": 64, "position": 64},
    "test": {"two": 64, "position": 64},
}


def _subsample(pool: list[Spec], limit: int | None) -> list[Spec]:
    """At most `limit` specifications, drawn at random with a fixed seed, in the pool's order."""
    if limit is None or len(pool) <= limit:
        return pool
    return [pool[i] for i in np.sort(np.random.default_rng(len(pool)).choice(len(pool), limit, replace=False))]


def _captions(kind: str, number: int, spec: Spec) -> list[str]:
    wordings = spec.captions()
    return wordings if kind in ("single", "counting") else [wordings[number % len(wordings)]]


def lines(split: str) -> list[str]:
    """The JSON lines of one split."""
    out = []
    for kind in KINDS:
        chosen = _subsample([s for s in specs(kind) if s.split == split], _LIMITS[split].get(kind))
        for number, spec in enumerate(chosen):
            out += [json.dumps({"prompt": text, **spec.metadata()}) for text in _captions(kind, number, spec)]
    return out


def main(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (Path(folder) / f"{split}.jsonl").write_text("\n".join(lines(split)) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flowalign.shapes.prompts FOLDER")
    main(sys.argv[1])
