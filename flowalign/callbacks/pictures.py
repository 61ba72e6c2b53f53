"""Grids of fixed prompts and seeds in TensorBoard: the slider shows what training changes."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from flowalign.evaluation import stills
from flowalign.grid import grid
from flowalign.module import AlignModule


class Pictures(Callback):
    """Writes `val/pictures` at every evaluation, the baseline included, and `rollout/pictures` beside it."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, AlignModule) or not trainer.is_global_zero:
            return
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for board in boards:
            if shown := pl_module.shown.get("val"):
                board.experiment.add_image("val/pictures", grid(shown), trainer.global_step, dataformats="HWC")
            if pl_module.rollout_shown is not None:
                board.experiment.add_images(
                    "rollout/pictures", stills(pl_module.rollout_shown[:16]), trainer.global_step
                )
