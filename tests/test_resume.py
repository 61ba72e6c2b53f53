"""Interrupted equals uninterrupted, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import pytest
import torch

from flowalign.rewards.base import RewardError
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.scoring import Scorer

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from flowalign.module import AlignModule

Fit = tuple["AlignModule", "Trainer", dict[str, float]]


class KilledError(Exception):
    """What happens to jobs."""


class Kill(lightning.Callback):
    """Ends the process at the start of the second epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise KilledError


@pytest.fixture
def fit(tiny: Callable[..., DictConfig], random_sd3: tuple[str, ...], tmp_path: Path) -> Callable[..., Fit]:
    """A new process in all but name: other global random numbers, a fresh module."""

    def run(
        folder: str,
        *overrides: str,
        seed: int,
        resume: Path | None = None,
        kill: bool = False,
        scorer: Scorer | None = None,
    ) -> Fit:
        from flowalign.module import AlignModule

        torch.manual_seed(seed)
        settings = ("callbacks=checkpoint", f"paths.output_dir={tmp_path / folder}", "trainer.max_epochs=2")
        cfg = tiny(*random_sd3, *settings, *overrides)
        recipe = build_recipe(cfg, scorer)
        module = AlignModule(recipe)
        trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
        trainer.callbacks.extend([Kill()] if kill else [])
        trainer.fit(module, ckpt_path=resume)
        return module, trainer, trainer.validate(module, verbose=False)[0]

    return run


def tensors(node: Any, name: str = "") -> dict[str, Any]:
    """Everything in a nest of dicts and lists, by its place."""
    if isinstance(node, dict):
        return {k: v for key, child in node.items() for k, v in tensors(child, f"{name}/{key}").items()}
    if isinstance(node, (list, tuple)):
        return {k: v for i, child in enumerate(node) for k, v in tensors(child, f"{name}/{i}").items()}
    return {name: node}


def differing(one: Any, other: Any) -> list[str]:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    return [k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])]


RECIPES = {
    "grpo": ("algo=grpo", "algo.kl_beta=0.04", "steps=random", "steps.num=3"),
    "nft": ("algo=nft", "algo.kl_beta=0.01", "dynamics=cps"),
    "nft by steps": ("algo=nft", "algo.kl_beta=0.01", "trainer.max_epochs=-1", "trainer.max_steps=4"),
}
SAVINGS = (
    "rollout.keep_in=bfloat16", "rollout.same_noise=true", "rollout.guidance=2",
    "optimisation.cfg_gradient=conditional", "optimisation.kl_share=0.34", "running.vae_channels_last=true",
    "batch.micro=auto",
)  # fmt: skip
COMMON = ("evaluation.weights=ema", "schedule.kind=cosine", "optimizer.lr=0.003")


@pytest.mark.parametrize(
    ("algo", "tune", "quantised"),
    [
        ("grpo", "lora", "null"),
        ("nft", "full", "null"),
        ("nft", "lora", "nf4"),
        ("nft by steps", "lora", "null"),
        pytest.param("grpo", "full", "null", marks=pytest.mark.slow),
        pytest.param("nft", "lora", "null", marks=pytest.mark.slow),
        pytest.param("grpo", "lora", "int8", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_equals_the_uninterrupted_one(
    fit: Callable[..., Fit], tmp_path: Path, algo: str, tune: str, quantised: str
):
    if quantised != "null":
        pytest.importorskip("torchao")
    overrides = (*RECIPES[algo], f"tune={tune}", f"model.quantised={quantised}", *COMMON)
    if quantised != "null":
        overrides += ("model.pretrained=tiny_sd3",)  # the random one's blocks are too small for that
    straight, trainer, metrics = fit("straight", *overrides, seed=1)
    with pytest.raises(KilledError):
        fit("killed", *overrides, seed=2, kill=True)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    halfway = torch.load(last, weights_only=True)["state_dict"]
    resumed, other, found = fit("killed", *overrides, seed=3, resume=last)

    assert differing(straight.state_dict(), resumed.state_dict()) == []
    assert differing(trainer.optimizers[0].state_dict(), other.optimizers[0].state_dict()) == []
    assert trainer.global_step == other.global_step == 4
    assert trainer.current_epoch == other.current_epoch == 2
    assert metrics == found
    assert straight.counts["rollout"] == resumed.counts["rollout"]
    copies = {"grpo": {"reference", "ema"}, "nft": {"old", "reference", "ema"}}[algo.split()[0]]
    assert set(straight.live.copies) == copies
    changed = differing(straight.state_dict(), halfway)  # the second epoch did something, to the copies as well
    assert {name.split(".")[2] for name in changed if ".copies." in name} == copies - {"reference"}


def test_what_is_trained_in_double_precision_is_continued_in_it(fit: Callable[..., Fit], tmp_path: Path):
    """Copies in the machine's memory too."""
    words = (*RECIPES["nft"], "tune=lora", *COMMON, "trainer.precision=64-true", "policy.device_of_frozen=cpu")
    straight, _, _ = fit("straight", *words, seed=1)
    assert {t.dtype for t in straight.state_dict().values()} == {torch.float64}
    with pytest.raises(KilledError):
        fit("killed", *words, seed=2, kill=True)
    resumed, _, _ = fit("killed", *words, seed=3, resume=tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert differing(straight.state_dict(), resumed.state_dict()) == []


def test_an_interrupted_run_with_every_saving_equals_the_uninterrupted_one(fit: Callable[..., Fit], tmp_path: Path):
    words = (*RECIPES["grpo"], "tune=lora", *COMMON, *SAVINGS)
    straight, _, metrics = fit("straight", *words, seed=1)
    with pytest.raises(KilledError):
        fit("killed", *words, seed=2, kill=True)
    resumed, _, found = fit("killed", *words, seed=3, resume=tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert differing(straight.state_dict(), resumed.state_dict()) == []
    assert (metrics, straight.counts["frozen"]) == (found, resumed.counts["frozen"])
    assert straight.counts["frozen"] < straight.counts["train"]  # the reference is asked for a share of the points


def test_an_interrupted_run_on_given_videos_equals_the_uninterrupted_one(
    fit: Callable[..., Fit], of_videos: tuple[str, ...], tmp_path: Path
):
    straight, trainer, metrics = fit("straight", *of_videos, seed=1)
    with pytest.raises(KilledError):
        fit("killed", *of_videos, seed=2, kill=True)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    halfway = torch.load(last, weights_only=True)["state_dict"]
    resumed, other, found = fit("killed", *of_videos, seed=3, resume=last)
    assert differing(straight.state_dict(), resumed.state_dict()) == []
    assert differing(trainer.optimizers[0].state_dict(), other.optimizers[0].state_dict()) == []
    assert differing(straight.state_dict(), halfway)
    assert metrics == found


class Light:
    """Mean of a picture, until so many have been scored."""

    def __init__(self, works_for: float = math.inf) -> None:
        self.left = works_for

    def __call__(self, media: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        self.left -= len(media)
        return media.flatten(1).mean(1) if self.left >= 0 else torch.full((len(media),), torch.nan)


def test_a_run_that_stops_for_want_of_scores_goes_on_from_its_checkpoint(fit: Callable[..., Fit], tmp_path: Path):
    """Four pictures in rollout and evaluation of the first epoch, then a batch of two of the second one."""
    words = (*RECIPES["nft"], "rollout.batch_size=2", "evaluation.sampling.batch_size=2")
    straight, _, _ = fit("straight", *words, seed=1, scorer=Scorer(Light()))
    with pytest.raises(RewardError, match=r"2 of the 4 pictures .* \(reward: 2\), more than max_missing=0.4"):
        fit("stopped", *words, seed=2, scorer=Scorer(Light(10), max_missing=0.4))
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    resumed, _, _ = fit("stopped", *words, seed=3, resume=last, scorer=Scorer(Light()))
    assert differing(straight.state_dict(), resumed.state_dict()) == []


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule(
    fit: Callable[..., Fit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the first step on: the shorter run had come to 0."""
    from flowalign.module import AlignModule

    rates: list[float] = []
    begin = AlignModule.on_train_batch_start

    def noted(self: AlignModule, batch: torch.Tensor, batch_idx: int) -> None:
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        begin(self, batch, batch_idx)

    monkeypatch.setattr(AlignModule, "on_train_batch_start", noted)
    fit("short", *RECIPES["nft"], "trainer.max_epochs=1", seed=1)
    short, last = len(rates), tmp_path / "short" / "checkpoints" / "last.ckpt"
    module, _, _ = fit("long", *RECIPES["nft"], seed=2, resume=last)
    assert module.done == (1, 2)
    assert rates[short] == pytest.approx(0.5 * rates[0])  # the cosine after one of two epochs


def test_a_checkpoint_holds_what_is_trained_and_not_the_base(fit: Callable[..., Fit], tmp_path: Path):
    module, _, _ = fit("run", "algo=nft", "algo.kl_beta=0.01", "trainer.max_epochs=1", seed=1)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    held = torch.load(path, weights_only=True)
    assert all("lora" in key for key in held["state_dict"])
    trained, base = module.live.parameter_counts()["trained"], module.live.parameter_counts()["parameters"]
    assert sum(t.numel() for t in held["state_dict"].values()) == 3 * trained  # live, old, reference
    assert held["flowalign"]["config"]["algo"]["_target_"].endswith("NFT")
    assert {p.name for p in path.parent.iterdir()} == {"last.ckpt", "best_epoch000.ckpt"}
    assert trained < base


def test_a_checkpoint_of_another_kind_of_run_is_refused_in_a_sentence(fit: Callable[..., Fit], tmp_path: Path):
    fit("run", "algo=nft", "algo.kl_beta=0.01", "trainer.max_epochs=1", seed=1)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    for other in ("tune=full", "tune.rank=8", "algo.kl_beta=0"):
        with pytest.raises(ValueError, match=r"does not fit this run .*another tune, rank, model"):
            fit("other", "algo=nft", "algo.kl_beta=0.01", other, seed=2, resume=last)
