"""Every algorithm on the embedded model: `make compare`, `make compare ARGS="--only grpo nft trainer.max_epochs=50"`.

Runs what is missing, resumes what was interrupted, and writes the table and curves into docs/algorithms/. Runs have one
thread each and run concurrently, which uses two cores better than two threads in one run.
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
PAGES = ROOT / "docs/algorithms"
BEGIN, END = "<!-- written by make compare -->", "<!-- end -->"
EPOCHS = 30
"""Fewer than the default 50: the ranking is clear by then, and 26 runs take an hour and a half instead of three."""
SEEDS = {
    **dict.fromkeys(("grpo", "grpo_guard", "mixgrpo", "tempflow", "nft", "awm", "flowawr"), (0, 1, 2)),
    **dict.fromkeys(("dance_grpo", "mixgrpo_flash", "flow_dppo", "dpo", "dgpo", "crd", "sft"), (0,)),
}
"""For every algorithm but flow_grpo_fast, which on the embedded model is identical to grpo."""


def run(algo: str, seed: int, folder: Path, overrides: list[str]) -> bool:
    """Complete one run, resuming what an earlier call left. Returns whether it succeeded."""
    if finished(folder):
        return True
    last = folder / "checkpoints" / "last.ckpt"
    resume = [f"ckpt_path={last}"] if last.is_file() else []
    words = [f"algo={algo}", f"seed={seed}", f"hydra.run.dir={folder}", *resume]
    if not any(word.startswith("trainer.max_epochs=") for word in overrides):
        words.append(f"trainer.max_epochs={EPOCHS}")
    command = [sys.executable, "train.py", *words]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.log").open("a") as console:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        code = subprocess.run([*command, *overrides], cwd=ROOT, env=one_thread, stdout=console, stderr=console)
    print(f"{algo}, seed {seed}: {'done' if code.returncode == 0 else f'failed, see {folder}/console.log'}", flush=True)
    return code.returncode == 0


def row(algo: str, folders: list[Path]) -> str:
    """Baseline and final values on the test prompts, the best of the validation curve, and the cost."""
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


def course(folders: list[Path]) -> str:
    """The validation curves of one algorithm as a table, one column per epoch."""
    curves = {name: [curve(folder, f"val/{name}") for folder in folders] for name in ("strict", "reward", "quality")}
    epochs = sorted(set.intersection(*(set(c) for group in curves.values() for c in group)))
    lines = [f"| epoch | {' | '.join(map(str, epochs))} |", "|---" * (len(epochs) + 1) + "|"]
    lines += [
        f"| `val/{name}` | {' | '.join(spread([c[epoch] for c in group]) for epoch in epochs)} |"
        for name, group in curves.items()
    ]
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Replace the part of the page between its two markers."""
    head, rest = page.read_text().split(BEGIN, 1)
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.split(END, 1)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[*SEEDS], help="algorithms")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: three for main algorithms, one for others")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs")
    parser.add_argument("--to", type=Path, default=ROOT / "outputs" / "compare")
    parser.add_argument("--keep", action="store_true", help="print the table without changing the docs")
    parser.add_argument("--report", action="store_true", help="run nothing; report what is finished")
    known, overrides = parser.parse_known_args()
    jobs = [(algo, seed) for algo in known.only for seed in known.seeds or SEEDS[algo]]
    jobs.sort(key=lambda job: job[1])  # one seed of each first, for an early comparison
    folders = {job: (known.to / job[0] / f"seed{job[1]}").resolve() for job in jobs}
    with ThreadPoolExecutor(known.jobs) as pool:
        todo = [] if known.report else jobs
        done = list(pool.map(lambda job: run(job[0], job[1], folders[job], overrides), todo))
    runs = {algo: [f for (a, _), f in folders.items() if a == algo and finished(f)] for algo in known.only}
    runs = {algo: found for algo, found in runs.items() if found}
    print(report(runs))
    if not known.keep:
        write(PAGES / "README.md", report(runs))
        plot(PAGES / "compare.png", runs)
        for algo, found in runs.items():
            write(PAGES / f"{algo}.md", f"{len(found)} seed(s), in percent.\n\n{course(found)}")
    return 0 if all(done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
