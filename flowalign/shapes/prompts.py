"""Writes the prompt files of the scenes world: `python -m flowalign.shapes.prompts FOLDER`.

One wording per specification, dealt in turn; single objects and numbers, of which there are few, appear in every
wording. The large kinds are thinned evenly, so that the files stay small and every kind is still well covered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from flowalign.shapes.world import KINDS, SPLITS, Spec, specs

_MOST = {
    "train": {"position": 364},
    "val": {"two": 64, "position": 64},
    "test": {"two": 64, "position": 64},
}


def _thinned(pool: list[Spec], most: int | None) -> list[Spec]:
    """At most so many of a pool, drawn without pattern but always the same, in the pool's order."""
    if most is None or len(pool) <= most:
        return pool
    return [pool[i] for i in np.sort(np.random.default_rng(len(pool)).choice(len(pool), most, replace=False))]


def _captions(kind: str, number: int, spec: Spec) -> list[str]:
    wordings = spec.captions()
    return wordings if kind in ("single", "counting") else [wordings[number % len(wordings)]]


def lines(split: str) -> list[str]:
    """The file of one split, line by line."""
    out = []
    for kind in KINDS:
        chosen = _thinned([s for s in specs(kind) if s.split == split], _MOST[split].get(kind))
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
