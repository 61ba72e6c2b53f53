"""A training ends once its reward no longer rises, at the same epoch whether or not it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.summary import Summary

if TYPE_CHECKING:
    import pytest
    from lightning import Trainer
    from omegaconf import DictConfig

NEVER_ENOUGH = ("callbacks.early_stopping.min_delta=9", "callbacks.early_stopping.patience=2")


def trained(cfg: DictConfig, resume: Path | None = None) -> tuple[Trainer, Summary]:
    from flowalign.module import AlignModule

    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.validate(module, verbose=False)  # the baseline is no evaluation of the training
    trainer.fit(module, ckpt_path=resume)
    return trainer, Summary(Path(cfg.paths.output_dir), 0, module)


def test_it_stops_at_the_same_epoch_after_an_interruption(
    tiny: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def run(folder: str, epochs: int, resume: str | None = None) -> Trainer:
        words = ("callbacks=[checkpoint,early_stopping]", *NEVER_ENOUGH, "schedule.kind=constant")
        cfg = tiny(*words, f"paths.output_dir={tmp_path / folder}", f"trainer.max_epochs={epochs}")
        trainer, summary = trained(cfg, resume and tmp_path / resume / "checkpoints" / "last.ckpt")
        summary.write(trainer)
        return trainer

    assert run("straight", 6).current_epoch == 3  # the first is best, and two more are not
    assert "after epoch 1" in capsys.readouterr().out
    run("halves", 2)
    assert run("halves", 6, "halves").current_epoch == 3
    states = [
        torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
        for folder in ("straight", "halves")
    ]
    (name,) = [key for key in states[0] if key.startswith("EarlyStopping")]
    assert states[0][name] == states[1][name]
    assert states[0][name]["wait_count"] == 2
    assert run("halves", 6, "halves").current_epoch == 4  # which is asked to go on does so until the next evaluation


def test_it_looks_at_evaluations_and_not_at_epochs(tiny: Callable[..., DictConfig]):
    words = ("callbacks=early_stopping", *NEVER_ENOUGH, "trainer.max_epochs=12", "trainer.check_val_every_n_epoch=2")
    trainer, _ = trained(tiny(*words))
    assert trainer.current_epoch == 6


def test_the_closing_table_names_the_best_checkpoint(
    tiny: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
):
    trainer, summary = trained(tiny("callbacks=[default,hacking_guard]"))
    summary.write(trainer)
    kept = summary.folder / "checkpoints"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best ")]
    assert [line.partition(" #")[0] for line in lines] == [
        f"best      flowalign evaluate ckpt={kept / name}_epoch000.ckpt " for name in ("best", "best_gold")
    ]
    reward = float(trainer.callback_metrics["val/reward"])
    assert lines[0].endswith(f"# val/reward {reward:.3f} after epoch 1")
