"""Trainings for the tests of strategies: in this process, or several in one pair of processes that torchrun starts.

    torchrun --nproc-per-node 2 -m tests.strategies.jobs FILE.json

FILE.json is a list of jobs, run one after another in the same processes: importing everything takes longer than them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
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
    killed: int = 0
    """This epoch does not begin; 0: all do."""
    torn: bool = False
    """The kill comes after the first batch of that epoch instead."""
    keeps: bool = False
    """The points of its first epoch stay in points<rank>.pt."""
    rooms: list[float] = field(default_factory=list)
    """Free bytes of the machine as each rank sees them, in this job and those after it; none: as they are."""
    late: bool = False
    """The test prompts' baseline is evaluated before the training and, as Watch tells, after its first epoch."""
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

    from flowalign import fitting

    torch.manual_seed(hash(job.folder) % 1000)  # nothing may depend on it
    words = settled(f"paths.output_dir={job.folder}", *WORDS, *job.words)
    if "tune=full" in words:
        words = [word for word in words if not word.startswith("tune.")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", words)
    if job.rooms:
        fitting._machine_available = partial(job.rooms.__getitem__, int(os.environ["RANK"]))
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


def killer(job: Job) -> Any:
    """A callback that ends the training where the job says."""
    from lightning.pytorch.callbacks import LambdaCallback

    def kill(trainer: Any, *arguments: Any) -> None:
        del arguments
        if trainer.current_epoch == job.killed:
            raise KilledError

    return LambdaCallback(on_train_batch_end=kill) if job.torn else LambdaCallback(on_train_epoch_start=kill)


def keep_points(job: Job, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
    """Sample, state, noise level and advantage of every point on this rank."""
    import torch

    del batch
    if trainer.current_epoch == 0 and batch_idx == 0:
        module._ensure_rollout()
        p = module.buffer.points
        held = {"sample": p.sample, "x": p.x, "sigma": p.sigma, "advantage": p.advantage}
        torch.save(held, Path(job.folder, f"points{trainer.global_rank}.pt"))


class Watch:
    """What a run does that its results do not show."""

    def __init__(self, recipe: Any) -> None:
        self.meta = [p.is_meta for denoiser in recipe.model.denoisers().values() for p in denoiser.parameters()]
        self.asked_for_others = 0
        self.late: dict[str, float] = {}
        self.at_once: dict[str, float] = {}

    def on(self, strategy: Any) -> None:
        """Counts how often this rank has to ask a network for which it has no row."""
        agree = strategy.agree

        def counted(wanted: Any) -> Any:
            agreed = agree(wanted)
            self.asked_for_others += int((agreed != wanted).sum())
            return agreed

        strategy.agree = counted

    def told(self) -> dict[str, Any]:
        meta = sum(self.meta) / len(self.meta)
        return {"meta": meta, "asked_for_others": self.asked_for_others, "late": self.late, "at_once": self.at_once}


def _fit(cfg: Any, job: Job, kept: list[dict[str, float]]) -> bool:
    import torch
    from lightning.pytorch.callbacks import LambdaCallback

    from flowalign.callbacks.late_baseline import LateBaseline
    from flowalign.loggers import continue_logs
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
    continue_logs(trainer.loggers, job.resume)
    if job.resume is None:
        module.baseline = dict(trainer.validate(module, verbose=False)[0])

    def keep(trainer: Any, module: Any) -> None:
        del module
        kept.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    trainer.callbacks.append(LambdaCallback(on_train_epoch_end=keep))  # type: ignore[attr-defined]
    if job.late:
        watch.at_once = dict(trainer.test(module, verbose=False)[0])
        trainer.callbacks.append(LateBaseline(lambda found, seconds: watch.late.update(found)))  # type: ignore
    if job.keeps:
        trainer.callbacks.append(LambdaCallback(on_train_batch_start=partial(keep_points, job)))  # type: ignore
    if job.killed:
        trainer.callbacks.append(killer(job))  # type: ignore[attr-defined]
    with suppress(KilledError):
        trainer.fit(module, ckpt_path=job.resume)
    told = watch.told() | {"shown": {stage: shown.prompts for stage, shown in module.shown.items()}}
    Path(job.folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(told))
    return trainer.is_global_zero


def main(path: str) -> None:
    for one in json.loads(Path(path).read_text()):
        print("job", one["folder"], flush=True)
        run(Job(**one))


def together(jobs: list[Job], folder: Path, processes: int = 2) -> None:
    """Runs them in some processes, and leaves none behind."""
    path = folder / f"{len(jobs)}_{jobs[0].name}.json"
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    started = subprocess.Popen(
        [sys.executable, *words, "-m", "tests.strategies.jobs", str(path)], cwd=ROOT, env=environment,
        start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = started.communicate(timeout=1700)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, said[-6000:]


if __name__ == "__main__":
    main(sys.argv[1])
