"""Minutes of training until the embedded model reaches a gain: `python bench/time_to_quality.py --algorithms nft`.

Runs `train.py` with the default settings of an algorithm and evaluates val/strict every few epochs; a run ends once it
is 30 points above the baseline. Minutes are those of training, without evaluations. A gain is reached at the first
evaluation at or above it. Every run becomes a row of time_to_quality.json when it ends; with --to the folder of an
earlier call, existing rows are not measured again.

The learning rate decays over --epochs, so results with different limits are not comparable.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring import ROOT  # noqa: E402
from bench.rows import Rows, markdown, place  # noqa: E402

ALGORITHMS = sorted(path.stem for path in (ROOT / "conf" / "algo").glob("*.yaml"))
METRIC = "val/strict"
GAINS = (20, 30)
"""Percentage points."""
CLOCK = "bench.clocks.Course"


def reached(points: Sequence[dict[str, float]], base: float, gain: float) -> dict[str, float] | None:
    """The first evaluation at or above base + gain, both in [0, 1]; None if there is none."""
    return next((point for point in points if point["value"] >= base + gain - 1e-9), None)


def standard_error(share: float, pictures: int) -> float:
    """Standard error of a share of independent images."""
    return math.sqrt(share * (1 - share) / pictures)


def figures(course: dict[str, Any]) -> dict[str, Any]:
    """Results of a run: minutes of training, shares in percent."""
    base, points, pictures = course["base"], course["points"], course["pictures"]
    found = {f"minutes_to_{gain}": reached(points, base, gain / 100) for gain in GAINS}
    best = max((point["value"] for point in points), default=base)
    last = points[-1] if points else {"epoch": 0, "train_s": 0.0}
    return {
        "base": round(100 * base, 2),
        **{name: None if point is None else round(point["train_s"] / 60, 2) for name, point in found.items()},
        "epochs": int(last["epoch"]),
        "best": round(100 * best, 2),
        "s_per_epoch": round(last["train_s"] / last["epoch"], 2) if points else None,
        "pictures": pictures,
        "error": round(100 * standard_error(best, pictures), 2),
    }


def run(given: argparse.Namespace, algo: str, seed: int) -> dict[str, Any]:
    """Train once; `failed` says why there are no results."""
    folder = (given.to / algo / f"seed{seed}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "course.json"
    path.unlink(missing_ok=True)  # left by an interrupted run
    command = [
        sys.executable, "train.py", f"algo={algo}", f"seed={seed}", f"hydra.run.dir={folder}", "test=false",
        f"trainer.max_epochs={given.epochs}", f"trainer.check_val_every_n_epoch={given.every}", "logger=none",
        "callbacks=none", f"+callbacks.course._target_={CLOCK}", f"+callbacks.course.path={path}",
        f"+callbacks.course.metric={METRIC}", f"+callbacks.course.enough={GAINS[-1] / 100}", *given.overrides,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads), "PYTHONPATH": str(ROOT)}
    with (folder / "console.log").open("w") as console:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=console, stderr=console).returncode
    if code or not path.is_file():
        return {"failed": f"exit code {code}, see console.log"}
    return {"failed": None} | figures(json.loads(path.read_text()))


def settings(given: argparse.Namespace, algo: str, seed: int) -> dict[str, Any]:
    """The settings that identify a measurement."""
    words = {"max_epochs": given.epochs, "every": given.every, "threads": given.threads}
    return {"algo": algo, "seed": seed} | words | {"overrides": given.overrides}


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table with one row per algorithm: medians over seeds, and how many reached a gain if not all did."""
    lines = []
    for algo in dict.fromkeys(row["algo"] for row in rows):
        mine = [row for row in rows if row["algo"] == algo and not row["failed"]]
        if mine:
            lines.append({"algorithm": f"`{algo}`", "seeds": len(mine)} | middle(mine))
    failed = [f"{row['algo']}, seed {row['seed']}: {row['failed']}" for row in rows if row["failed"]]
    return "\n".join([markdown(lines), *failed])


def middle(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The columns of one row: medians over runs."""

    def minutes(gain: int) -> str:
        found = [row[f"minutes_to_{gain}"] for row in rows if row[f"minutes_to_{gain}"] is not None]
        some = "" if len(found) == len(rows) else f" ({len(found)} of {len(rows)})"
        return f"{median(found):.1f}{some}" if found else "not reached"

    def of(key: str) -> float:
        return median(row[key] for row in rows)

    return {
        "base": f"{of('base'):.1f}",
        **{f"minutes to +{gain}": minutes(gain) for gain in GAINS},
        "epochs": f"{of('epochs'):g}",
        "best": f"{of('best'):.1f} ± {of('error'):.1f}",
        "s an epoch": f"{of('s_per_epoch'):.2f}",
        "pictures": int(of("pictures")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS, metavar="ALGORITHM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=100, help="maximum per run")
    parser.add_argument("--every", type=int, default=2, help="epochs between evaluations")
    parser.add_argument("--threads", type=int, default=2, help="per run; runs are sequential")
    parser.add_argument("--report", action="store_true", help="run nothing; report the existing rows")
    parser.add_argument("--to", type=Path, default=place())
    given = parser.parse_intermixed_args()
    rows = Rows(given.to / "time_to_quality.json", metric=METRIC)
    for seed, algo in product(given.seeds, [] if given.report else given.algorithms):
        known = settings(given, algo, seed)
        if not rows.has(**known):
            rows.add(known | run(given, algo, seed), *known)
            print(markdown([{k: v for k, v in rows.rows[-1].items() if k != "overrides"}]), flush=True)
    print(report(rows.rows))
    print(rows.path)
    return 1 if any(row["failed"] for row in rows.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
