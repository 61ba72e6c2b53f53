"""Two rewards on different scales: `python bench/two_rewards.py` trains on their plain sum and with credit=gdpo.

`reward=shapes_light` rewards prompt adherence and, with a tenth of the spread, brightness. Runs what is missing,
resumes what was interrupted, prints a table and draws docs/two_rewards.png.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compare import ROOT, run
from curves import plot
from runs import finished, spread, summary

CREDITS = {"global_std": "plain sum", "gdpo": "gdpo"}
METRICS = ("light", "shapes", "strict", "quality")


def report(runs: dict[str, list[Path]]) -> str:
    """Validation metrics before and after training, in percent, mean ± standard deviation over seeds."""
    lines = ["| credit | seeds | " + " | ".join(f"`val/{name}`" for name in METRICS) + " |"]
    lines.append("|---" * (len(METRICS) + 2) + "|")
    for name, folders in runs.items():
        found = [summary(folder) for folder in folders]
        cells = [
            " → ".join(spread([d[phase][f"val/{metric}"] for d in found]) for phase in ("baseline", "final"))
            for metric in METRICS
        ]
        lines.append(f"| {name} | {len(folders)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs, with one thread each")
    parser.add_argument("--to", type=Path, default=ROOT / "outputs" / "two_rewards")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is finished")
    known, overrides = parser.parse_known_args()
    words = ["reward=shapes_light", "test=false", *overrides]
    folders = {(c, seed): (known.to / c / f"seed{seed}").resolve() for seed in known.seeds for c in CREDITS}
    with ThreadPoolExecutor(known.jobs) as pool:
        todo = [] if known.report else [*folders]
        done = list(pool.map(lambda job: run("nft", job[1], folders[job], [f"credit={job[0]}", *words]), todo))
    runs = {
        label: [folder for (c, _), folder in folders.items() if c == credit and finished(folder)]
        for credit, label in CREDITS.items()
    }
    runs = {label: found for label, found in runs.items() if found}
    if runs:
        print(report(runs))
        plot(ROOT / "docs" / "two_rewards.png", runs, ("val/light", "val/shapes"))
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
