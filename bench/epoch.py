"""How close an epoch comes to the cost of its network calls: `make bench`, or `make bench ARGS="--help"`.

The floor of an epoch is (calls of the bare network × cost of one) + VAE decodes. Costs are measured in the same
process, right before and after the epoch that they are compared with, so that other load slows both. Every workload
runs in its own process, since peak memory never decreases.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring import QUIET, alone, built, composed  # noqa: E402
from bench.rows import BENCHES, Rows, place  # noqa: E402

WORKLOADS = {
    f"{algo}_{tune}": (f"algo={algo}", f"tune={tune}")
    for algo in ("grpo", "nft", "awm", "flowawr")
    for tune in ("lora", "full")
}

CALLS = 3
"""Timed calls of each kind per sitting."""


@dataclass
class Row:
    """One workload: medians over epochs. Efficiency is the median of the epochs' own floor ÷ time, between `lowest` and
    `highest`; raw_fwd_units: bare forward passes at the rollout's batch size."""

    workload: str
    floor_s: float
    actual_s: float
    efficiency: float
    lowest: float
    highest: float
    images_per_s: float
    peak_rss_mb: float
    raw_fwd_units: float


class Floor:
    """Times calls of the network and the VAE, with the batch sizes of the module's epochs."""

    def __init__(self, module: Any) -> None:
        import copy

        from flowalign.buffer import IndexLoader

        r, self.module = module.recipe, module
        self.batch = min(r.rollout.batch_size, module.geometry.samples_local)
        self.micro = next(iter(IndexLoader(module.geometry, r.seed, 0)))
        # Rollouts are compared with the network without adapters, as it was before training.
        self.bare = copy.copy(r.model)
        self.bare.pipe = copy.copy(r.model.pipe)
        self.bare.pipe.transformer = copy.deepcopy(r.model.pipe.transformer)
        if r.tune.kind == "lora":
            self.bare.pipe.transformer.unload_lora()
        self.costs: list[dict[str, float]] = []
        """Mean seconds of a call of each kind, by sitting."""
        self.counts: list[dict[str, int]] = []
        """The module's counts so far, by sitting."""

    def measure(self) -> None:
        """A sitting, on the points of the last epoch."""
        import torch

        module, r = self.module, self.module.recipe
        point, cond = module.buffer.gather(torch.arange(self.batch) % len(module.buffer.points.x))
        small, small_cond = module.buffer.gather(self.micro)
        parameters = list(module.live.trained().values())

        def train() -> None:
            v = module._velocity(small.x, small.sigma, small_cond)
            torch.autograd.grad(v.square().mean(), parameters, allow_unused=True)

        with torch.no_grad():
            forward = seconds(lambda: self.bare.velocity(point.x, point.sigma, cond, r.rollout.guidance))
            decode = seconds(lambda: r.model.decode(point.x))
        self.costs.append({"forward": forward, "decode": decode, "train": seconds(train)})
        self.counts.append(dict(module.counts))

    @property
    def epochs(self) -> list[float]:
        """Floor of each epoch between two sittings: its calls, as the module counts them, times their mean costs.
        Partial batches count pro rata."""
        g = self.module.geometry
        calls = [
            {
                "forward": sum(after[kind] - before[kind] for kind in ("rollout", "frozen")) / self.batch,
                "decode": g.samples_local / self.batch,
                "train": g.batches_per_epoch,
            }
            for before, after in pairwise(self.counts)
        ]
        around = [{kind: (one[kind] + two[kind]) / 2 for kind in one} for one, two in pairwise(self.costs)]
        return [sum(n[kind] * cost[kind] for kind in cost) for n, cost in zip(calls, around, strict=True)]

    @property
    def forward(self) -> float:
        """Seconds of a bare forward pass."""
        return median(cost["forward"] for cost in self.costs)


def seconds(call: Callable[[], object]) -> float:
    """Mean time of a call, as an epoch is a sum of calls; the first one, which finds cold caches, is not timed."""
    call()
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS


def measure(workload: str, epochs: int, overrides: list[str]) -> Row:
    """Time `epochs` epochs after one warm-up epoch."""
    from bench.clocks import Phases

    module, trainer = built(
        composed(
            [
                *WORKLOADS[workload],
                *QUIET,
                f"paths.output_dir={BENCHES}",
                f"trainer.max_epochs={epochs + 1}",
                *overrides,
            ]
        )
    )
    found: list[Floor] = []

    def measure_floor() -> None:
        found.extend([] if found else [Floor(module)])
        found[0].measure()

    watch = Phases(after=measure_floor)
    trainer.callbacks.append(watch)  # type: ignore
    trainer.fit(module)
    actual, floors = watch.epochs[1:], found[0].epochs
    ratios = [floor / whole for floor, whole in zip(floors, actual, strict=True)]
    return Row(
        workload=workload,
        floor_s=round(median(floors), 4),
        actual_s=round(median(actual), 4),
        efficiency=round(median(ratios), 4),
        lowest=round(min(ratios), 4),
        highest=round(max(ratios), 4),
        images_per_s=round(module.geometry.samples / median(actual), 3),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        raw_fwd_units=round(median(actual) / found[0].forward, 2),
    )


def random_model(name: str, folder: Path) -> list[str]:
    """Write a random model and return the overrides that select it; none for the embedded one."""
    if name == "tiny_sd3":
        return []
    from bench.random_sd3 import SIZES, random_sd3

    return random_sd3(SIZES[name], folder)


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="One warm epoch: the floor of the network alone, and the actual time")
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "workload" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs, after one warm-up epoch")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--model", default="tiny_sd3", help="or a random one: 8M, 30M (parameters)")
    parser.add_argument("--to", type=Path, default=place())
    given = parser.parse_intermixed_args()
    rows = Rows(given.to / "bench.json")
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*random_model(given.model, Path(folder)), *given.overrides]
        for workload in given.only:
            rows.add(asdict(alone(measure, workload, given.epochs, overrides)), "workload")
    show(rows.rows)
    print(rows.path)


if __name__ == "__main__":
    main()
