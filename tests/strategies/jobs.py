"""Trainings for the tests of strategies: in this process, or several in one pair of processes that torchrun starts.

    torchrun --nproc-per-node 2 -m tests.strategies.jobs FILE.json

FILE.json is a list of jobs, run one after another in the same processes: importing everything takes longer than them.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, TINY, settled

WORDS = ("logger=none", "callbacks=checkpoint", *TINY, "batch.updates=1", "optimizer.lr=0.003", "tune.rank=4")


@dataclass
class Job:
    """One fit, and what comes of it in `folder`: checkpoints/last.ckpt and metrics.json."""

    folder: str
    words: list[str] = field(default_factory=list)
    resume: str | None = None
    killed: bool = False
    """The second epoch does not begin."""
    refused: bool = False
    """The job is to raise ValueError, whose sentence is kept in metrics.json."""

    @property
    def last(self) -> Path:
        return Path(self.folder) / "checkpoints" / "last.ckpt"

    @property
    def name(self) -> str:
        return Path(self.folder).name

    def rank(self, rank: int) -> Any:
        """What one rank saw; see Watch."""
        return json.loads((Path(self.folder) / f"rank{rank}.json").read_text())

    @property
    def metrics(self) -> Any:
        return json.loads((Path(self.folder) / "metrics.json").read_text())


def run(job: Job) -> None:
    """Under torchrun on every rank, and on one process otherwise."""
    import torch
    from hydra import compose, initialize_config_dir

    torch.manual_seed(hash(job.folder) % 1000)  # nothing may depend on it
    words = settled(f"paths.output_dir={job.folder}", *WORDS, *job.words)
    if "tune=full" in words:
        words = [word for word in words if not word.startswith("tune.")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", words)
    Path(job.folder).mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, float]] = []
    try:
        first = _fit(cfg, job, kept)
    except ValueError as refusal:
        if not job.refused:
            raise
        Path(job.folder, "metrics.json").write_text(json.dumps(str(refusal)))
        return
    if first:
        Path(job.folder, "metrics.json").write_text(json.dumps(kept))


class KilledError(Exception):
    """What happens to jobs."""


def _kill(trainer: Any, module: Any) -> None:
    del module
    if trainer.current_epoch == 1:
        raise KilledError


class Watch:
    """What a run does that its results do not show."""

    def __init__(self, recipe: Any) -> None:
        self.meta = [p.is_meta for denoiser in recipe.model.denoisers().values() for p in denoiser.parameters()]
        self.asked_for_others = 0

    def on(self, strategy: Any) -> None:
        """Counts how often this rank has to ask a network for which it has no row."""
        agree = strategy.agree

        def counted(wanted: Any) -> Any:
            agreed = agree(wanted)
            self.asked_for_others += int((agreed != wanted).sum())
            return agreed

        strategy.agree = counted

    def told(self) -> dict[str, float]:
        return {"meta": sum(self.meta) / len(self.meta), "asked_for_others": self.asked_for_others}


def _fit(cfg: Any, job: Job, kept: list[dict[str, float]]) -> bool:
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    recipe = build_recipe(cfg)
    watch = Watch(recipe)
    module = AlignModule(recipe)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    if "fsdp_cp" in " ".join(job.words):
        # diffusers divides by the number of accelerators before it makes a mesh; ours is of CPUs.
        torch.accelerator.device_count = lambda: 1
    if hasattr(trainer.strategy, "agree"):
        watch.on(trainer.strategy)
    trainer.validate(module, verbose=False)

    def keep(trainer: Any, module: Any) -> None:
        del module
        kept.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer.callbacks.append(LambdaCallback(on_train_epoch_end=keep))  # type: ignore[attr-defined]
    if job.killed:
        trainer.callbacks.append(LambdaCallback(on_train_epoch_start=_kill))  # type: ignore[attr-defined]
    with suppress(KilledError):
        trainer.fit(module, ckpt_path=job.resume)
    Path(job.folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(watch.told()))
    return trainer.is_global_zero


def main(path: str) -> None:
    for one in json.loads(Path(path).read_text()):
        print("job", one["folder"], flush=True)
        run(Job(**one))


def save(jobs: list[Job], path: Path) -> Path:
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    return path


if __name__ == "__main__":
    main(sys.argv[1])
