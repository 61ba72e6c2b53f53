"""How near an epoch comes to the network calls that it cannot do without: `make bench`, or `make bench ARGS="--help"`.

The floor of an epoch is (calls of the bare network × cost of one) + VAE decodes. Costs are measured in the same
process, between the epochs that they are compared with, so that a busy machine slows both. Every workload has a process
of its own, since peak memory only ever rises.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
WORKLOADS = {
    f"{algo}_{tune}": (f"algo={algo}", f"tune={tune}")
    for algo in ("grpo", "nft", "awm", "flowawr")
    for tune in ("lora", "full")
}


@dataclass
class Row:
    """One workload. Seconds are medians over epochs; raw_fwd_units = epochs in bare forwards at the rollout's batch."""

    workload: str
    floor_s: float
    actual_s: float
    efficiency: float
    images_per_s: float
    peak_rss_mb: float
    raw_fwd_units: float


class Floor:
    """Times single calls of the bare parts, as an epoch of this module makes them."""

    def __init__(self, module: Any) -> None:
        import copy

        import torch

        from flowalign.buffer import IndexLoader

        r, self.module = module.recipe, module
        self.batch = min(r.rollout.batch_size, module.geometry.samples_local)
        self.micro = next(iter(IndexLoader(module.geometry, r.seed, 0)))
        # Rollouts are measured against the network without adapters, which is what there was before training.
        self.bare = copy.copy(r.model)
        self.bare.pipe = copy.copy(r.model.pipe)
        self.bare.pipe.transformer = copy.deepcopy(r.model.pipe.transformer)
        if r.tune.kind == "lora":
            self.bare.pipe.transformer.unload_lora()
        self.times: dict[str, list[float]] = {}
        self.no_grad = torch.no_grad

    def measure(self) -> None:
        """One call of each kind on the points of the last epoch."""
        import torch

        module, r = self.module, self.module.recipe
        point, cond = module.buffer.gather(torch.arange(self.batch) % len(module.buffer.points.x))
        with self.no_grad():
            self._time("forward", lambda: self.bare.velocity(point.x, point.sigma, cond, r.rollout.guidance))
            self._time("decode", lambda: r.model.decode(point.x))
        small, small_cond = module.buffer.gather(self.micro)
        parameters = list(module.live.trained().values())

        def train() -> None:
            v = module._velocity(small.x, small.sigma, small_cond)
            torch.autograd.grad(v.square().mean(), parameters, allow_unused=True)

        self._time("train", train)

    def _time(self, name: str, call: Callable[[], object]) -> None:
        began = time.perf_counter()
        call()
        self.times.setdefault(name, []).append(time.perf_counter() - began)

    def cost(self, name: str) -> float:
        return median(self.times[name])

    def seconds(self) -> float:
        """An epoch's calls, as the module counts them, times what each costs; a smaller batch counts by its share."""
        module = self.module
        g = module.geometry
        epochs = module.counts["samples"] / g.samples
        forwards = (module.counts["rollout"] + module.counts["frozen"]) / epochs / self.batch
        return (
            forwards * self.cost("forward")
            + g.samples_local / self.batch * self.cost("decode")
            + g.batches_per_epoch * self.cost("train")
        )


def stopwatch(module: Any, repeats: int) -> Any:
    """A callback: wall time of every epoch, and the floor measured after each."""
    import lightning

    class Stopwatch(lightning.Callback):
        def __init__(self) -> None:
            self.epochs: list[float] = []
            self.floor: Floor | None = None

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.began = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.epochs.append(time.perf_counter() - self.began)
            self.floor = self.floor or Floor(module)
            for _ in range(repeats):
                self.floor.measure()

    return Stopwatch()


def measure(workload: str, epochs: int, overrides: list[str]) -> Row:
    """Warm up for an epoch, then time `epochs` more."""
    from hydra import compose, initialize_config_dir

    from flowalign.module import AlignModule
    from flowalign.run import CONF, build_recipe, build_trainer, plan_accumulation, quieten

    quieten()

    quiet = ["logger=none", "callbacks=none", "trainer.check_val_every_n_epoch=9999", "paths.output_dir=outputs/bench"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*WORKLOADS[workload], *quiet, f"trainer.max_epochs={epochs + 1}", *overrides])
    recipe = build_recipe(cfg)
    module = AlignModule(recipe)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    watch = stopwatch(module, repeats=3)
    trainer.callbacks.append(watch)  # type: ignore
    trainer.fit(module)
    actual, floor = median(watch.epochs[1:]), watch.floor.seconds()
    return Row(
        workload=workload,
        floor_s=round(floor, 4),
        actual_s=round(actual, 4),
        efficiency=round(floor / actual, 4),
        images_per_s=round(module.geometry.samples / actual, 3),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        raw_fwd_units=round(actual / watch.floor.cost("forward"), 2),
    )


def random_model(name: str, folder: Path) -> list[str]:
    """Overrides that choose it, once it is made; none for the embedded one."""
    if name == "tiny_sd3":
        return []
    from random_sd3 import TOKENS, write

    return [f"model.pretrained={write(name, folder)}", "model.absent=[]", f"model.max_sequence_length={TOKENS}"]


def show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="One epoch, warm: what the network alone would take, and what it took")
    for column in asdict(rows[0]):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in asdict(row).values()))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs, after one to warm up")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--model", default="tiny_sd3", help="or a random one: 8M, 30M (parameters)")
    parser.add_argument("--to", type=Path, default=None, help="folder; outputs/bench/<time> unless given")
    given = parser.parse_intermixed_args()
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        overrides = [*random_model(given.model, Path(place)), *given.overrides]
        for workload in given.only:
            with spawn.Pool(1) as process:
                rows.append(process.apply(measure, (workload, given.epochs, overrides)))
    show(rows)
    folder = given.to or ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    print(folder / "bench.json")


if __name__ == "__main__":
    main()
