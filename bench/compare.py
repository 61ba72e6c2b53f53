"""Every algorithm on the embedded model: `make compare`, or `make compare ARGS="--only grpo nft --seeds 0 1"`.

Runs what is missing, continues what was interrupted, and writes table and curves into docs/algorithms/. Runs have one
thread each and stand side by side, which uses two cores better than two threads in one run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from curves import plot
from runs import curve, finished, spread, summary

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs/algorithms/README.md", ROOT / "docs/algorithms/compare.png"
BEGIN, END = "<!-- written by make compare -->", "<!-- end -->"
SEEDS = {
    **dict.fromkeys(("grpo", "grpo_guard", "mixgrpo", "tempflow", "nft", "awm", "flowawr"), (0, 1, 2)),
    **dict.fromkeys(("mixgrpo_flash", "flow_grpo_fast", "flow_dppo", "dpo", "dgpo", "crd", "sft"), (0,)),
}


def run(algo: str, seed: int, folder: Path, overrides: list[str]) -> bool:
    """One run to its end; what a former call left is continued. Whether it succeeded."""
    if finished(folder):
        return True
    last = folder / "checkpoints" / "last.ckpt"
    resume = [f"ckpt_path={last}"] if last.is_file() else []
    command = [sys.executable, "train.py", f"algo={algo}", f"seed={seed}", f"hydra.run.dir={folder}", *resume]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.log").open("a") as console:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        code = subprocess.run([*command, *overrides], cwd=ROOT, env=one_thread, stdout=console, stderr=console)
    print(f"{algo}, seed {seed}: {'done' if code.returncode == 0 else f'failed, see {folder}/console.log'}", flush=True)
    return code.returncode == 0


def row(algo: str, folders: list[Path]) -> str:
    """Base → final of the test prompts, the best of the validation curve, and what it cost."""
    documents = [summary(folder) for folder in folders]
    before = [d["baseline"]["test/strict"] for d in documents]
    after = [d["final"]["test/strict"] for d in documents]
    best = [max(curve(folder, "val/strict").values()) for folder in folders]
    quality = [d["final"]["test/quality"] - d["baseline"]["test/quality"] for d in documents]
    gain = [b - a for a, b in zip(before, after, strict=True)]
    calls, minutes = documents[0]["network_calls"]["total"], statistics.fmean(d["train_s"] for d in documents) / 60
    cells = [
        f"`{algo}`", str(len(folders)), spread(before), spread(after), spread(gain), spread(best), spread(quality),
        str(documents[0]["epochs"]), f"{calls:,}", f"{minutes:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def report(runs: dict[str, list[Path]]) -> str:
    heads = [
        "algo", "seeds", "base", "final", "gain", "best on val", "quality gain", "epochs", "network calls", "minutes",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(row(algo, folders) for algo, folders in runs.items())])


def write(text: str) -> None:
    """The part of the page between its two marks."""
    page = PAGE.read_text()
    head, rest = page.split(BEGIN, 1)
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[*SEEDS], help="algorithms")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of three for the main ones and one for others")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--to", type=Path, default=ROOT / "outputs" / "compare")
    parser.add_argument("--keep", action="store_true", help="print the table and leave the docs alone")
    known, overrides = parser.parse_known_args()
    jobs = [(algo, seed) for algo in known.only for seed in known.seeds or SEEDS[algo]]
    jobs.sort(key=lambda job: job[1])  # one seed of each first: an interrupted comparison is still one
    folders = {job: (known.to / job[0] / f"seed{job[1]}").resolve() for job in jobs}
    with ThreadPoolExecutor(known.jobs) as pool:
        done = list(pool.map(lambda job: run(job[0], job[1], folders[job], overrides), jobs))
    runs = {algo: [f for (a, _), f in folders.items() if a == algo and finished(f)] for algo in known.only}
    runs = {algo: found for algo, found in runs.items() if found}
    print(report(runs))
    if not known.keep:
        write(report(runs))
        plot(PICTURE, runs)
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
