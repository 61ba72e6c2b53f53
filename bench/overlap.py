"""Time saved by scoring one batch while the next one is sampled: `python bench/overlap.py`.

A dummy reward sleeps for as long as sampling takes. Three kinds of rollout phases are then timed alternately, in one
process: sampling with a reward that takes no time, scoring after sampling, and scoring concurrently.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


class Sleeper:
    """A reward of 0 that takes `seconds` per image."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, media: Any, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        import torch

        time.sleep(self.seconds * len(media))
        return torch.zeros(len(media))


def collector(overrides: list[str]) -> Any:
    """The rollout phase of a run, outside of a trainer."""
    from hydra import compose, initialize_config_dir

    from flowalign.collect import Collector
    from flowalign.conditioner import Conditioner
    from flowalign.process import silence_libraries
    from flowalign.recipe import batch_plan
    from flowalign.run import CONF, build_recipe

    silence_libraries()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["paths.output_dir=outputs/bench", *overrides])
    r = build_recipe(cfg)
    return Collector(
        r.model, r.algorithm, r.dynamics, r.steps, r.times, r.rollout, r.credit, r.scorer, r.data["train"],
        Conditioner(r.model, guided=False), batch_plan(r), r.train_size, r.seed,
    )  # fmt: skip


def measure(collect: Any, repeats: int, ahead: int) -> dict[str, float]:
    """Median seconds, and the median ratio of the overlapped phase to sampling, which takes as long as scoring."""
    import torch

    from flowalign.scoring import ScoreQueue, Scorer

    reward, samples = Sleeper(), collect.geometry.samples

    def timed(seconds: float, ahead: int) -> float:
        reward.seconds, collect.scorer = seconds, Scorer(reward, ahead=ahead)
        began = time.perf_counter()
        with torch.no_grad(), ScoreQueue(ahead) as queue:
            collect(0, 0, torch.device("cpu"), queue, lambda rewards: rewards, lambda done, mean: None).assign_credit()
        collect.scorer.close()
        return time.perf_counter() - began

    timed(0.0, 0)  # warm
    found: dict[str, list[float]] = {"sampling": [], "in_turn": [], "beside": []}
    for _ in range(repeats):
        # Sampling is timed before and after, since the load of the machine may change.
        before = timed(0.0, 0)
        found["beside"].append(timed(before / samples, ahead))
        found["sampling"].append((before + timed(0.0, 0)) / 2)
        found["in_turn"].append(timed(before / samples, 0))
    middle = {name: round(median(values), 3) for name, values in found.items()}
    ratios = [beside / sampling for beside, sampling in zip(found["beside"], found["sampling"], strict=True)]
    batches = -(-samples // collect.sampling.batch_size)
    return middle | {"batches": batches, "ratio": round(median(ratios), 3), "floor": round((batches + 1) / batches, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ahead", type=int, default=1, help="batches that may have pending scores")
    parser.add_argument("--to", type=Path, default=ROOT / "outputs" / "bench" / "overlap.json")
    given = parser.parse_intermixed_args()
    row = measure(collector(["rollout.batch_size=9", *given.overrides]), given.repeats, given.ahead)
    for name, value in row.items():
        print(f"{name:9} {value}")
    given.to.parent.mkdir(parents=True, exist_ok=True)
    given.to.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
