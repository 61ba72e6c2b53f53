"""Memory: planned against measured peaks, and whether anything leaks. `python bench/memory.py`.

plan: a random SD3 in its own process for grpo and nft, with LoRA and full fine-tuning. Planned is the plan that a run
prints (flowalign/memory.py). Measured is the peak resident memory of the training, less what was resident before the
model was loaded; the process trains the embedded model first, so that Python, its libraries and their thread pools are
part of the latter. Each is measured with the C library's default allocator, which keeps and splits freed memory, and
with every block of 64 KiB or more in its own mapping, so that only memory in use is resident.
growth: resident memory after every epoch of a tiny geometry with all callbacks, loggers and evaluations of a usual run.
buffer: whether the training points of grpo are those of the trained steps only, and keep no other memory alive.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import resident  # noqa: E402
from bench.measuring import QUIET, alone, built, composed  # noqa: E402
from bench.random_sd3 import SIZES, random_sd3  # noqa: E402
from bench.rows import Rows, markdown, place  # noqa: E402

MIB = 2**20
WORKLOADS = {
    f"{algo}_{tune}": (f"algo={algo}", f"tune={tune}") for algo in ("grpo", "nft") for tune in ("lora", "full")
}
COMMON = (
    "reward=brightness", "reward.self_check=false", "credit=global_std", "batch.prompts=2", "batch.group_size=4",
    "batch.micro=8", "batch.updates=1", "rollout.batch_size=8", "rollout.num_steps=4", "times.num=null",
    "evaluation.num_val=2", "evaluation.num_test=2", "evaluation.shown=2", "trainer.accelerator=cpu",
)  # fmt: skip
TINY = (
    *COMMON, "batch.group_size=2", "batch.micro=3", "rollout.batch_size=4", "evaluation.sampling.num_steps=2",
    "trainer.check_val_every_n_epoch=10", "callbacks=[checkpoint,preemption,ranks,pictures]",
)  # fmt: skip
ALLOCATORS = {"as it comes": {}, "mapped": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}}
"""Environment variables of the allocator of glibc."""
FLAT = 0.01
"""Growth from epochs 20 to 40 to the last 20 that counts as none."""


# ------------------------------------------------------------ plan


def planned_and_measured(workload: str, model: list[str], folder: str, overrides: list[str]) -> dict[str, Any]:
    """One row. Sizes in MiB."""
    import torch

    torch.set_num_threads(1)
    words = [*COMMON, *WORKLOADS[workload], *QUIET, f"paths.output_dir={folder}", "trainer.max_epochs=2"]
    _train(words)
    resident.settle()
    before = resident.now()
    plan, peak, how = _train([*words, *model, *overrides])
    planned, measured = sum(plan.values()), peak - before
    return {
        "planned_mib": round(planned / MIB, 1),
        "measured_mib": round(measured / MIB, 1),
        "ratio": round(measured / planned, 3),
        "before_mib": round(before / MIB, 1),
        "peak": how,
        "plan_mib": {name: round(size / MIB, 1) for name, size in plan.items()},
    }


def _train(words: Sequence[str]) -> tuple[dict[str, int], int, str]:
    """The plan by line, the peak in bytes of two epochs, and how the peak was measured."""
    from lightning.pytorch.callbacks import LambdaCallback

    module, trainer = built(composed(words))
    plan: dict[str, int] = {}
    restarted: list[bool] = []

    def begin(trainer: Any, pl_module: Any) -> None:
        plan.update({share.name: share.size for share in module.memory_plan()})
        resident.settle()
        restarted.append(resident.restart_peak())

    trainer.callbacks.append(LambdaCallback(on_train_start=begin))  # type: ignore
    trainer.fit(module)
    how = "VmHWM of the training" if restarted[0] else "ru_maxrss of the process, loading included"
    return plan, resident.peak(restarted[0]), how


@contextmanager
def environment(words: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes started within this context."""
    before = os.environ.copy()
    os.environ.update(words)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def plans(given: argparse.Namespace) -> bool:
    rows = Rows(given.to / "memory_plan.json", model=given.model)
    for workload, (allocator, words) in product(given.only, ALLOCATORS.items()):
        with tempfile.TemporaryDirectory() as folder, environment(words):
            model = random_sd3(SIZES[given.model], Path(folder))
            found = alone(planned_and_measured, workload, model, f"{folder}/out", given.overrides)
        rows.add({"workload": workload, "allocator": allocator} | found, "workload", "allocator")
    print(markdown([{k: v for k, v in row.items() if k != "plan_mib"} for row in rows.rows]))
    return True


# ------------------------------------------------------------ growth


def growth(sizes: Sequence[float], window: int = 20) -> float:
    """Ratio of the medians of the last and the second window. Raises ValueError if there are fewer than 3 windows."""
    if len(sizes) < 3 * window:
        raise ValueError(f"two windows of {window} after the first need {3 * window} epochs (got {len(sizes)}).")
    return median(sizes[-window:]) / median(sizes[window : 2 * window])


def after_every_epoch(epochs: int, folder: str, overrides: list[str]) -> list[int]:
    """Resident bytes after every epoch."""
    import torch
    from lightning import Callback

    torch.set_num_threads(1)

    class Scales(Callback):
        sizes: list[int] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch:  # the previous epoch has been checkpointed by now
                self.weigh()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.weigh()

        def weigh(self) -> None:
            resident.settle()
            self.sizes.append(resident.now())

    words = (*TINY, f"paths.output_dir={folder}", f"trainer.max_epochs={epochs}", *overrides)
    module, trainer = built(composed(words))
    trainer.validate(module, verbose=False)
    trainer.callbacks.append(Scales())  # type: ignore
    trainer.fit(module)
    return Scales.sizes


def grows(given: argparse.Namespace) -> bool:
    """Measure every workload. Returns whether none grows."""
    rows = Rows(given.to / "memory_growth.json")
    for workload in given.only:
        with tempfile.TemporaryDirectory() as folder:
            words = [*WORKLOADS[workload], *given.overrides]
            sizes = alone(after_every_epoch, given.epochs, folder, words)
        ratio = growth(sizes, min(20, given.epochs // 3))
        rows.add(
            {
                "workload": workload,
                "epochs": given.epochs,
                "first_mib": round(sizes[0] / MIB, 1),
                "last_mib": round(sizes[-1] / MIB, 1),
                "ratio": round(ratio, 4),
                "flat": ratio <= 1 + FLAT,
                "mib": [round(size / MIB, 2) for size in sizes],
            },
            "workload",
        )
    print(markdown([{k: v for k, v in row.items() if k != "mib"} for row in rows.rows]))
    return all(row["flat"] for row in rows.rows)


# ------------------------------------------------------------ buffer


def buffered(algorithm: str, folder: str, overrides: list[str]) -> dict[str, Any]:
    """Train one epoch and check its buffer."""
    words = (*COMMON, *QUIET, f"algo={algorithm}", f"paths.output_dir={folder}", "trainer.max_epochs=1", *overrides)
    module, trainer = built(composed(words))
    trainer.fit(module)
    return held_points(module)


def held_points(module: Any) -> dict[str, Any]:
    """Compare the points in the buffer with images × trained steps, and bytes of storage with bytes of values.

    More storage than values would mean a view that keeps more alive, such as a whole trajectory.
    """
    import torch

    from flowalign.memory import storage_bytes

    points, plan = module.buffer.points, module.collect.plan(module.buffer.epoch)
    tensors = [t for t in [*vars(points).values(), *points.frozen.values()] if isinstance(t, torch.Tensor)]
    expected = module.geometry.trained_local * len(plan.trained)
    stored, values = storage_bytes(tensors), sum(t.nbytes for t in tensors)
    return {
        "steps": module.recipe.rollout.num_steps,
        "trained_steps": len(plan.trained),
        "points": len(points.x),
        "expected_points": expected,
        "stored_kib": round(stored / 1024, 1),
        "values_kib": round(values / 1024, 1),
        "only_trained_steps": len(points.x) == expected and stored <= values,
    }


def buffers(given: argparse.Namespace) -> bool:
    rows = Rows(given.to / "memory_buffer.json")
    for algorithm in ("grpo", "flow_grpo_fast", "mixgrpo"):
        with tempfile.TemporaryDirectory() as folder:
            found = alone(buffered, algorithm, folder, ["rollout.num_steps=10", "batch.micro=2", *given.overrides])
        rows.add({"algorithm": algorithm} | found, "algorithm")
    print(markdown(rows.rows))
    return all(row["only_trained_steps"] for row in rows.rows)


PARTS = {"plan": plans, "growth": grows, "buffer": buffers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--model", choices=SIZES, default="100M", help="of the plan: its parameters")
    parser.add_argument("--epochs", type=int, default=200, help="of the growth")
    parser.add_argument("--to", type=Path, default=place())
    given = parser.parse_intermixed_args()
    passed = [PARTS[part](given) for part in given.parts]
    print(given.to)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
