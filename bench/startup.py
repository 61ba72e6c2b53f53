"""Time to `python train.py --help`, and to the first optimiser step: `python bench/startup.py`.

Seconds from the start of the process, measured alternately several times; medians, with ranges in brackets. For the
default run also its milestones: parts loaded, baseline evaluated (on the validation prompts; that on the test prompts
comes after the first epoch), first rollout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring import ROOT  # noqa: E402
from bench.rows import Rows, markdown, place  # noqa: E402

MOMENTS = {
    "loaded": "parts loaded",
    "evaluated": "baseline evaluated",
    "rolled_out": "first rollout",
    "stepped": "first optimiser step",
}


def launched(words: list[str]) -> float:
    """Run `train.py` with these arguments to a successful end. Returns the Unix time of its start."""
    began = time.time()
    subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return began


def help_once() -> dict[str, float]:
    began = launched(["--help"])
    return {"--help": time.time() - began}


def run_once(overrides: list[str]) -> dict[str, float]:
    """Seconds from the start to each milestone of a run, which ends at its first optimiser step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moments.json"
        callback = ("+callbacks.moments._target_=bench.clocks.Moments", f"+callbacks.moments.path={path}")
        began = launched([f"hydra.run.dir={folder}/run", *callback, *overrides])
        found = json.loads(path.read_text())
    return {name: found[key] - began for key, name in MOMENTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of the run, as for train.py")
    parser.add_argument("--repeats", type=int, default=5, help="after one warm-up of each, which fills the file cache")
    parser.add_argument("--to", type=Path, default=place())
    given = parser.parse_intermixed_args()
    seconds: dict[str, list[float]] = {}
    for turn in range(given.repeats + 1):
        for name, value in (help_once() | run_once(given.overrides)).items():
            if turn:
                seconds.setdefault(name, []).append(value)
    rows = Rows(given.to / "startup.json", overrides=given.overrides)
    rows.rows = [summed(name, values) for name, values in seconds.items()]
    rows.write()
    print(markdown(rows.rows))
    print(rows.path)


def summed(name: str, seconds: list[float]) -> dict[str, Any]:
    """The row of one measurement."""
    spread = f"[{min(seconds):.2f}, {max(seconds):.2f}]"
    return {"what": name, "median_s": round(median(seconds), 2), "range_s": spread, "repeats": len(seconds)}


if __name__ == "__main__":
    main()
