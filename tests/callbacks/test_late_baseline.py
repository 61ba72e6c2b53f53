"""What is evaluated after the first epoch is the policy from before it, and the training does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from flowalign.callbacks.late_baseline import LateBaseline, unchanged_copy
from flowalign.evaluating import in_eval_mode
from flowalign.loggers import read_csv
from flowalign.run import build_recipe, build_trainer, evaluate, fit, plan_accumulation, postpones_test
from flowalign.summary import Summary

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from flowalign.module import AlignModule

Run = tuple["AlignModule", "Trainer", Summary]
MOVING = ("optimizer.lr=0.003", "trainer.max_epochs=2")


@pytest.fixture
def trained(tiny: Callable[..., DictConfig], random_sd3: tuple[str, ...], tmp_path: Path) -> Callable[..., Run]:
    """A run up to the end of its training, in a folder of its own."""

    def train(*words: str, late: bool) -> Run:
        from flowalign.module import AlignModule

        folder = tmp_path / ("late" if late else "at_once")
        settings = ("callbacks=checkpoint", "logger=csv", f"paths.output_dir={folder}", *MOVING)
        cfg = tiny(*random_sd3, *settings, *words)
        recipe = build_recipe(cfg)
        module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
        summary = Summary(folder, 0, module)
        summary.baseline(evaluate(trainer, module, test=not late))
        fit(trainer, module, summary, None, late)
        return module, trainer, summary

    return train


def rows(trainer: Trainer, of: str) -> list[tuple[int, dict[str, str]]]:
    """Step and values of the rows of metrics.csv that have such names."""
    found = read_csv(Path(trainer.default_root_dir) / "csv" / "metrics.csv")
    chosen = [(int(row["step"]), {k: v for k, v in row.items() if k.startswith(of)}) for row in found]
    return [(step, row) for step, row in chosen if row]


@pytest.mark.parametrize(
    ("words", "copy"),
    [
        (("algo=grpo", "tune=full"), ""),
        (("algo=grpo", "tune=lora", "evaluation.weights=ema"), ""),
        (("algo=grpo", "tune=lora", "algo.kl_beta=0.04"), "reference"),
        (("algo=nft", "tune=full"), "old"),
    ],
)
def test_it_is_the_baseline_from_before_and_training_goes_as_without(
    trained: Callable[..., Run], words: tuple[str, ...], copy: str
):
    at_once, trainer, summary = trained(*words, late=False)
    late, other, found = trained(*words, late=True)
    assert unchanged_copy(late) == copy
    assert {"test/reward", "val/reward"} <= summary.results["baseline"].keys()
    assert summary.results["baseline"] == found.results["baseline"]
    assert summary.before
    assert found.before
    assert torch.equal(summary.before.images, found.before.images)
    assert rows(trainer, "test/") == rows(other, "test/")
    assert [step for step, _ in rows(other, "test/")] == [0]
    a, b = late.state_dict(), at_once.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert rows(trainer, "train/") == rows(other, "train/")
    assert late.counts == at_once.counts
    assert not late.live.snapshots


def test_it_differs_from_the_trained_policy(trained: Callable[..., Run]):
    """Or the test above would say nothing."""
    module, trainer, found = trained("algo=nft", "tune=lora", late=True)
    assert evaluate(trainer, module, test=True)["test/velocity_rms"] != found.results["baseline"]["test/velocity_rms"]


def test_a_run_too_short_for_its_average_says_so(trained: Callable[..., Run], caplog: pytest.LogCaptureFixture):
    words = ("algo=nft", "tune=lora", "evaluation.weights=ema", "frozen.ema.interval=8")
    module, trainer, found = trained(*words, late=False)
    assert evaluate(trainer, module, test=False)["val/reward"] == found.results["baseline"]["val/reward"]
    assert (
        "frozen.ema follows every 8 optimiser steps, and there were 4: it still holds the weights from" in caplog.text
    )


def test_the_first_checkpoint_holds_the_whole_baseline(trained: Callable[..., Run]):
    _, trainer, found = trained("algo=nft", "trainer.max_epochs=1", late=True)
    file = torch.load(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt", weights_only=True)
    assert file["flowalign"]["baseline"] == found.results["baseline"]
    assert not any("start" in key for key in file["state_dict"])


@pytest.mark.parametrize("word", ["trainer.max_epochs=0", "trainer.max_steps=1", "trainer.fast_dev_run=true"])
def test_every_end_of_a_training_leaves_a_whole_baseline(trained: Callable[..., Run], word: str):
    _, _, summary = trained("algo=nft", word, late=False)
    _, _, found = trained("algo=nft", word, late=True)
    assert found.results["baseline"] == summary.results["baseline"]


def test_a_copy_in_the_memory_of_the_device_is_in_the_plan(tiny: Callable[..., DictConfig]):
    from flowalign.module import AlignModule

    cfg = tiny("algo=grpo", "tune=full", "trainer.check_val_every_n_epoch=99")
    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.validate(module, verbose=False)
    LateBaseline(lambda metrics, seconds: None).on_train_start(trainer, module)
    lines = {line.name: line.size for line in module.memory_plan()}
    assert lines["weights from before training"] == lines["gradients"]


def test_who_asks_for_an_end_is_told_how_long_it_will_take(tiny: Callable[..., DictConfig]):
    from flowalign.module import AlignModule

    cfg = tiny("algo=nft", "evaluation.sampling.batch_size=1")
    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.validate(module, verbose=False)
    left: list[float] = []
    module.between_batches = left.append
    module.evaluate_test("old")
    assert len(left) == 4
    assert min(left[:3]) > 0
    assert left[3] == 0


def test_what_is_not_trained_or_optimised_for_test_prompts_is_evaluated_at_once(tiny: Callable[..., DictConfig]):
    assert postpones_test(tiny())
    for word in ("train=false", "test=false", "optimized_metric=test/reward"):
        assert not postpones_test(tiny(word))


def test_every_part_of_a_module_has_its_own_mode_again():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout().eval(), nn.Dropout()))
    with in_eval_mode(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [True, True, True, False, True]
