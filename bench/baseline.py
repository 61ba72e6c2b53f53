"""The cost of an epoch in bare forward passes, compared with another system: `python bench/baseline.py --compile`.

A random SD3 of 7.8 million parameters, one thread, 32 images of 64 × 64 in batches of 8, ten steps of which nine are
trained on. Times are CPU seconds of the process, which depend less on other load. Before and after every epoch the same
process times bare forward passes of one batch (no adapters, not compiled; 16 rows with guidance), and the cost of the
epoch is given in these units. The first epoch, which includes all compilation, is reported separately.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.measuring import QUIET, TEN_STEPS, alone, built, composed, cpu  # noqa: E402
from bench.rows import Rows, markdown, place  # noqa: E402

COMMON = (
    "reward=brightness", "reward.self_check=false",
    "credit=global_std", "data.train.limit=4", "batch.prompts=4", "batch.group_size=8", "batch.micro=8",
    "batch.updates=2", "rollout.num_steps=10", "rollout.batch_size=8", "times.num=null",
    "evaluation.num_val=2", "evaluation.num_test=2",
    "trainer.accelerator=cpu", *QUIET,
)  # fmt: skip
GRPO = ("algo=grpo", "steps=all", "rollout.same_noise=false", "algo.clip=1e-4")
NFT = ("algo=nft", *TEN_STEPS, "frozen.old.every=always")
AWM = ("algo=awm", "algo.ema_beta=0", "batch.micro=9")  # a micro-batch holds the nine points of an image
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
UNIT = 8
"""Rows of a bare forward pass: the batch size of the other system, whatever ours is."""
RIVALS = {
    "grpo_lora": 158, "grpo_full": 152, "nft_lora": 191, "nft_full": 187, "awm_lora": 186, "awm_full": 187,
    "grpo_lora_cfg": 142, "grpo_lora_kl": 194,
}  # fmt: skip
"""Flow-Factory 0.1.0 on these workloads; gradients through both branches of guidance, KL penalty at every point."""


@dataclass
class Row:
    """One workload: medians in bare forward passes of one batch and in CPU seconds, with ranges in brackets."""

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
    """Including warm-up and compilation, in this process and its children."""
    peak_rss_mb: float


def with_children() -> float:
    """CPU seconds of this process and of its finished children, such as compilers."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


class Around:
    """Times bare forward passes before and after every epoch, and all CPU seconds of the first epoch."""

    def __init__(self, bare: Callable[[], None]) -> None:
        self.bare = bare
        self.forwards: list[float] = []
        self.all: list[float] = []

    def before(self) -> None:
        self._forwards()
        self.all.append(with_children())

    def after(self) -> None:
        self.all.append(with_children())
        self._forwards()

    def _forwards(self) -> None:
        times = []
        for _ in range(5):
            began = cpu()
            self.bare()
            times.append(cpu() - began)
        self.forwards.append(median(times))


def bare_forward(recipe: Any) -> Callable[[], None]:
    """A forward pass of UNIT rows through the untouched pretrained network."""
    import copy

    import torch

    model = copy.copy(recipe.model)
    model.pipe = copy.copy(recipe.model.pipe)
    model.pipe.transformer = copy.deepcopy(recipe.model.pipe.transformer)
    x = torch.randn(UNIT, *model.latent_shape(*recipe.train_size.area))
    cond = model.encode(["a red circle"] * UNIT, [""] * UNIT)

    @torch.no_grad()
    def call() -> None:
        model.velocity(x, 0.5, cond, recipe.rollout.guidance)

    return call


def words(workload: str) -> list[str]:
    """The overrides of a workload, without those of the model."""
    return [*COMMON, *(word for part in WORKLOADS[workload] for word in part)]


def measure(workload: str, model: list[str], folder: str, compiled: bool, epochs: int, overrides: list[str]) -> Row:
    """Measure `epochs` epochs after one warm-up epoch."""
    import torch

    from bench.clocks import Phases

    torch.set_num_threads(1)
    ours = (
        f"paths.output_dir={folder}", f"trainer.max_epochs={epochs + 1}", f"running.compile={str(compiled).lower()}",
    )  # fmt: skip
    module, trainer = built(composed([*words(workload), *model, *ours, *overrides]))
    around = Around(bare_forward(module.recipe))
    seen = Phases(cpu, around.before, around.after)
    trainer.callbacks.append(seen)  # type: ignore
    trainer.fit(module)
    return row(workload, compiled, seen, around)


def row(workload: str, compiled: bool, seen: Any, around: Around) -> Row:
    """Summarise all epochs but the first, each in units of the bare forward passes just before and after it."""
    forwards = [(a + b) / 2 for a, b in zip(around.forwards[2::2], around.forwards[3::2], strict=True)]

    def units(seconds: list[float]) -> list[float]:
        return [s / forward for s, forward in zip(seconds[1:], forwards, strict=True)]

    epochs, optimise = units(seen.epochs), units(seen.seconds["optimise"])
    return Row(
        workload=workload,
        compiled=compiled,
        epochs=len(epochs),
        units=round(median(epochs), 1),
        units_range=(round(min(epochs), 1), round(max(epochs), 1)),
        rivals_units=RIVALS[workload],
        rollout_units=round(median(e - o for e, o in zip(epochs, optimise, strict=True)), 1),
        optimise_units=round(median(optimise), 1),
        epoch_s=round(median(seen.epochs[1:]), 3),
        forward_s=round(median(forwards), 4),
        first_epoch_s=round(around.all[1] - around.all[0], 1),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for train.py")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--epochs", type=int, default=5, help="measured epochs, after one warm-up epoch")
    parser.add_argument("--compile", action="store_true", help="compile block by block (running.compile)")
    parser.add_argument("--to", type=Path, default=place())
    given = parser.parse_intermixed_args()
    rows = Rows(given.to / "baseline.json")
    with tempfile.TemporaryDirectory() as folder:
        from bench.random_sd3 import SIZES, random_sd3

        model = random_sd3(SIZES["8M"], Path(folder))
        for workload in given.only:
            found = alone(measure, workload, model, f"{folder}/out", given.compile, given.epochs, given.overrides)
            rows.add(asdict(found), "workload", "compiled")
            print(markdown(rows.rows[-1:]), flush=True)
    print(markdown(rows.rows))
    print(rows.path)


if __name__ == "__main__":
    main()
