"""An epoch in bare forwards, beside what two other systems take for the same: `python bench/baseline.py --compile`.

A random SD3 of 7.8 million parameters, one thread, 32 pictures of 64 × 64 in batches of 8, ten steps of which nine are
trained on. Time is the CPU's, of the process: other work on the machine then matters less. Before and after every
epoch the same process times bare forwards of a batch (no adapters, not compiled; with guidance of 16 rows), and the
epoch is given in these. The first epoch, with all compilation, is told apart.
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
COMMON = (
    "model.absent=[]", "model.max_sequence_length=32", "reward=brightness", "reward.self_check=false",
    "credit=global_std", "data.train.limit=4", "batch.prompts=4", "batch.group_size=8", "batch.micro=8",
    "batch.updates=2", "rollout.num_steps=10", "rollout.batch_size=8", "times.num=null",
    "evaluation.num_val=2", "evaluation.num_test=2",
    "logger=none", "callbacks=none", "trainer.accelerator=cpu", "trainer.check_val_every_n_epoch=9999",
)  # fmt: skip
GRPO = ("algo=grpo", "steps=all", "rollout.same_noise=false", "algo.clip=1e-4")
NFT = ("algo=nft", "frozen.old.every=always")
AWM = ("algo=awm", "algo.ema_beta=0", "batch.micro=9")  # nine points of a picture belong together: as many rows in all
LORA = ("tune=lora", "tune.rank=8", "tune.alpha=16")
FULL = ("tune=full",)
WORKLOADS = {
    "grpo_lora": (GRPO, LORA),
    "grpo_full": (GRPO, FULL),
    "nft_lora": (NFT, LORA),
    "nft_full": (NFT, FULL),
    "awm_lora": (AWM, LORA),
    "awm_full": (AWM, FULL),
    "grpo_lora_cfg": (GRPO, LORA, ("rollout.guidance=4.5", "optimisation.cfg_gradient=conditional")),
    "grpo_lora_kl": (GRPO, LORA, ("algo.kl_beta=1e-3", "optimisation.kl_share=0.33")),
}
RIVALS = {
    "grpo_lora": 158, "grpo_full": 152, "nft_lora": 191, "nft_full": 187, "awm_lora": 186, "awm_full": 187,
    "grpo_lora_cfg": 142, "grpo_lora_kl": 194,
}  # fmt: skip
"""Flow-Factory 0.1.0 on this workload; guidance with both gradients, the penalty at every point."""


@dataclass
class Row:
    """One workload. Units are bare forwards of one batch; CPU seconds; medians, the range in brackets."""

    workload: str
    compiled: bool
    epochs: int
    units: float
    units_range: tuple[float, float]
    rivals_units: float
    rollout_units: float
    optimise_units: float
    epoch_s: float
    forward_s: float
    first_epoch_s: float
    """With warming up, and with compiling in this process and its children."""
    peak_rss_mb: float


def cpu() -> float:
    """CPU seconds of this process so far."""
    return time.process_time()


def with_children() -> float:
    """The same with compilers that have ended."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def watch(module: Any, bare: Callable[[], None]) -> Any:
    """A callback: CPU seconds of both phases of every epoch, and of bare forwards around it."""
    from lightning import Callback

    class Watch(Callback):
        def __init__(self) -> None:
            self.forwards: list[float] = []
            self.rollouts: list[float] = []
            self.epochs: list[float] = []
            self.first = 0.0

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self._forwards()
            self.began, self.all_began = cpu(), with_children()
            module._ensure_rollout()
            self.rollouts.append(cpu() - self.began)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.epochs.append(cpu() - self.began)
            self.first = self.first or with_children() - self.all_began
            self._forwards()

        def _forwards(self) -> None:
            times = []
            for _ in range(5):
                began = cpu()
                bare()
                times.append(cpu() - began)
            self.forwards.append(median(times))

    return Watch()


def bare_forward(recipe: Any) -> Callable[[], None]:
    """A rollout batch through the network as it comes from its folder."""
    import copy

    import torch

    model = copy.copy(recipe.model)
    model.pipe = copy.copy(recipe.model.pipe)
    model.pipe.transformer = copy.deepcopy(recipe.model.pipe.transformer)
    batch = recipe.rollout.batch_size
    x = torch.randn(batch, *model.latent_shape(*recipe.train_size.area))
    cond = model.encode(["a red circle"] * batch, [""] * batch)

    @torch.no_grad()
    def call() -> None:
        model.velocity(x, 0.5, cond, recipe.rollout.guidance)

    return call


def measure(workload: str, folder: str, compiled: bool, epochs: int, overrides: list[str]) -> Row:
    """Some epochs after one that warms up."""
    import torch
    from hydra import compose, initialize_config_dir

    from flowalign.module import AlignModule
    from flowalign.run import CONF, build_recipe, build_trainer, plan_accumulation, quieten

    torch.set_num_threads(1)
    quieten()
    words = [
        *COMMON, *(word for part in WORKLOADS[workload] for word in part), f"model.pretrained={folder}",
        f"paths.output_dir={folder}/out", f"trainer.max_epochs={epochs + 1}",
        f"running.compile={str(compiled).lower()}",
    ]  # fmt: skip
    words = {word.partition("=")[0]: word for word in [*words, *overrides]}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(words.values()))
    recipe = build_recipe(cfg)
    module = AlignModule(recipe)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    seen = watch(module, bare_forward(recipe))
    trainer.callbacks.append(seen)  # type: ignore
    trainer.fit(module)
    return row(workload, compiled, seen)


def row(workload: str, compiled: bool, seen: Any) -> Row:
    """Each epoch but the first, in the bare forwards just before and after it."""
    around = [(a + b) / 2 for a, b in zip(seen.forwards[2::2], seen.forwards[3::2], strict=True)]

    def units(seconds: list[float]) -> list[float]:
        return [s / forward for s, forward in zip(seconds[1:], around, strict=True)]

    epochs, rollouts = units(seen.epochs), units(seen.rollouts)
    return Row(
        workload=workload,
        compiled=compiled,
        epochs=len(epochs),
        units=round(median(epochs), 1),
        units_range=(round(min(epochs), 1), round(max(epochs), 1)),
        rivals_units=RIVALS[workload],
        rollout_units=round(median(rollouts), 1),
        optimise_units=round(median(e - r for e, r in zip(epochs, rollouts, strict=True)), 1),
        epoch_s=round(median(seen.epochs[1:]), 3),
        forward_s=round(median(around), 4),
        first_epoch_s=round(seen.first, 1),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )


def table(rows: list[Row]) -> str:
    """Markdown."""
    heads = list(asdict(rows[0]))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join(lines + [f"| {' | '.join(str(value) for value in asdict(row).values())} |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--epochs", type=int, default=5, help="measured epochs, after one to warm up")
    parser.add_argument("--compile", action="store_true", help="block by block (running.compile)")
    parser.add_argument("--to", type=Path, default=ROOT / "outputs" / "bench" / time.strftime("%Y-%m-%d_%H-%M-%S"))
    given = parser.parse_intermixed_args()
    given.to.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        from random_sd3 import write

        write("8M", Path(folder))
        for workload in given.only:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                rows.append(process.apply(measure, (workload, folder, given.compile, given.epochs, given.overrides)))
            (given.to / "baseline.json").write_text(
                json.dumps({"rows": [asdict(row) for row in rows]}, indent=2) + "\n"
            )
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    print(given.to / "baseline.json")


if __name__ == "__main__":
    main()
