"""What a continued run is compared by: the whole checkpoint, and everything that was logged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowalign.checks import ConfigError
from flowalign.geometry import PlanError
from flowalign.loggers import read_csv
from flowalign.planning import check_plan
from flowalign.prompts import ASSETS
from flowalign.strategies import folders
from tests.conftest import ROOT, settled
from tests.strategies.jobs import WORDS, Job

EPOCHS = 4
BY_THE_CLOCK = ("rollout/seconds", "rollout/images_per_s")
NEEDS_LATENT = ("prfl",)
"""Algorithms that follow a latent reward, which the package has once it lies among its assets."""
ALGORITHMS = [
    name
    for name in sorted(path.stem for path in (ROOT / "conf" / "algo").glob("*.yaml"))
    if name not in NEEDS_LATENT or (ASSETS / "latent_shapes").exists()
]
BASE = (
    "logger=[csv,tensorboard]", f"trainer.max_epochs={EPOCHS}", "trainer.check_val_every_n_epoch=1",
    "evaluation.weights=ema", "evaluation.num_val=2", "evaluation.sampling.num_steps=2", "rollout.num_steps=4",
    "batch.prompts=2", "batch.group_size=2", "batch.micro=2", "batch.updates=2", "optimizer.lr=1e-3",
)  # fmt: skip
CHOSEN = {
    "flow_grpo_fast": ("steps.width=2",),
    "tempflow": ("steps.branches=2", "steps.num=1"),
    "mixgrpo": ("rollout.num_steps=6", "steps.stay=1"),  # the window moves in every epoch
    "mixgrpo_flash": ("rollout.num_steps=6", "steps.stay=1"),
}
KINDS = {
    "lora": ("tune=lora", "tune.rank=4"),
    "full": ("tune=full",),
    "lora_compiled": ("tune=lora", "tune.rank=4", "running.compile=true"),
    "full_compiled": ("tune=full", "running.compile=true"),
    "lora_ddp": ("tune=lora", "tune.rank=4", "strategy=ddp", "trainer.devices=2"),
    "full_fsdp": ("tune=full", "strategy=fsdp", "trainer.devices=2"),
}


def words(algo: str, kind: str) -> list[str]:
    """The smallest run of an algorithm whose batches fit."""
    return fitting([*settled(*BASE, f"algo={algo}", *CHOSEN.get(algo, ()), "algo.kl_beta=0.01", *KINDS[kind])])


def fitting(given: list[str]) -> list[str]:
    """These words, with the batch that the planner recommends where theirs does not fit."""
    from hydra import compose, initialize_config_dir

    both = settled(*WORDS, *given)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [w for w in both if "tune=full" not in both or not w.startswith("tune.")])
    try:
        check_plan(cfg)
    except ConfigError as error:
        if not isinstance(error.__cause__, PlanError):
            raise
        return settled(*given, *(f"batch.{name}={value}" for name, value in error.__cause__.changes.items()))
    return given


def jobs(folder: Path, algo: str, kind: str, **more: Any) -> tuple[Job, Job, Job]:
    """Four epochs at a stretch; two; and the other two, in the folder of the first two."""
    given = words(algo, kind)
    half = str(folder / f"{algo}_{kind}_halves")
    first = Job(half, given, killed=EPOCHS // 2, **more)
    return Job(str(folder / f"{algo}_{kind}_straight"), given), first, Job(half, given, resume=str(first.last))


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """Places where two nests of plain values and tensors differ in a bit, in kind or in what there is."""
    if type(one) is not type(other):
        return [f"{place}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        ragged = [f"{place}/{key}: in one only" for key in one.keys() ^ other.keys()]
        return ragged + [d for k in one.keys() & other.keys() for d in differing(one[k], other[k], f"{place}/{k}")]
    if isinstance(one, (list, tuple)):
        ragged = [f"{place}: {len(one)} and {len(other)}"] if len(one) != len(other) else []
        pairs = zip(one, other, strict=False)
        return ragged + [d for i, (a, b) in enumerate(pairs) for d in differing(a, b, f"{place}/{i}")]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{place}: tensors"]
    return [] if one == other or one != one != other else [f"{place}: {one} and {other}"]


def held(job: Job) -> Any:
    """A job's last checkpoint with "…" in place of its own folder.

    Without what decides nothing: the counters of evaluations outside the training (only the straight run has had a
    baseline), and the score of the last file, which Lightning shows and does not read back.
    """
    state = _elsewhere(folders.read(job.last), job.folder)
    state["loops"] = {"fit_loop": state["loops"]["fit_loop"]}
    for callback in state["callbacks"].values():
        callback.pop("current_score", None)
    return state


def _elsewhere(node: Any, folder: str) -> Any:
    if isinstance(node, dict):
        return {_elsewhere(k, folder): _elsewhere(v, folder) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_elsewhere(v, folder) for v in node)
    return node.replace(folder, "…") if isinstance(node, str) else node


def files(job: Job) -> set[str]:
    return {path.name for path in job.last.parent.iterdir()}


def rows(job: Job) -> list[tuple[tuple[str, str], ...]]:
    """All that is in metrics.csv but what the clock says, in order."""
    found = read_csv(Path(job.folder) / "csv" / "metrics.csv")
    return [tuple(sorted((k, v) for k, v in row.items() if k not in BY_THE_CLOCK)) for row in found]


def scalars(job: Job) -> dict[str, Counter[tuple[int, str]]]:
    """Steps and values, as text since NaN is no number, of every tag that TensorBoard shows, by how often it does."""
    board = EventAccumulator(str(Path(job.folder) / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if tag not in BY_THE_CLOCK]
    return {tag: Counter((event.step, repr(event.value)) for event in board.Scalars(tag)) for tag in tags}


def check_equal(straight: Job, resumed: Job) -> None:
    """To the last bit: weights, copies, moments, schedule, loops, callbacks, counters, config, and what was logged."""
    one, other = held(straight), held(resumed)
    assert differing(one, other) == []
    assert one["epoch"] == EPOCHS - 1
    assert one["optimizer_states"][0]["state"]
    assert files(straight) == files(resumed)
    assert rows(straight) == rows(resumed)
    assert scalars(straight) == scalars(resumed)
    check_once(resumed)


def check_once(job: Job) -> None:
    """Every value of every step is there, once: a reward for each epoch, a loss for each."""
    shown = scalars(job)
    for tag in ("train/loss", "val/reward"):
        assert len(shown[tag]) == EPOCHS + (tag == "val/reward")  # the baseline
        assert set(shown[tag].values()) == {1}
