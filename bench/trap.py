"""Callbacks and rewards that inject faults at a chosen moment: a signal, a NaN loss, a failed allocation."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from flowalign.report import Report

PHASES = {"rollout": "rollout", "optimisation": "optimise", "validation": "evaluate"}
MOMENTS = (*PHASES, "writing")


class Trap(Callback, Report):
    """Sends this process a signal in epoch 1, after the first batch of a phase or while the checkpoint is written.

    Writes two files into `folder`: the time of the signal to `snapped` + rank, and the last epoch begun to `epoch`.
    """

    def __init__(self, folder: str, moment: str = "", send: str = "SIGTERM", ranks: list[int] | None = None) -> None:
        """moment: one of MOMENTS, or "" for no signal; ranks: those that get the signal, None: all."""
        self.moment, self.send, self.ranks, self.folder = moment, signal.Signals[send], ranks, Path(folder)
        self.module: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.module = pl_module
        if trainer.state.fn == "fit":
            pl_module.report = self  # type: ignore[assignment]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            (self.folder / "epoch").write_text(str(trainer.current_epoch))

    def advance(self, phase: str, done: int, **values: float) -> None:
        if phase == PHASES.get(self.moment):
            self._snap()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.moment != "writing":
            return
        if not trainer.is_global_zero:  # rank 0 writes, and the others wait for it
            self._snap()
            return
        sync = os.fsync

        def interrupted(handle: Any) -> None:
            self._snap()
            sync(handle)

        os.fsync = interrupted  # type: ignore[assignment]

    def _snap(self) -> None:
        module = self.module
        assert module is not None
        if module.current_epoch != 1 or self.ranks is not None and module.global_rank not in self.ranks:
            return
        (self.folder / f"snapped{module.global_rank}").write_text(str(time.time()))
        self.moment = ""
        os.kill(os.getpid(), self.send)


class NotFinite(Callback):
    """Sets the loss of one point to NaN on one rank, in the first micro-batch of some epochs."""

    def __init__(self, epochs: list[int], rank: int = 0) -> None:
        self.epochs, self.rank = epochs, rank

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        loss = pl_module.recipe.algorithm.loss

        def spoilt(*arguments: Any) -> Any:
            losses, metrics = loss(*arguments)
            if trainer.global_rank == self.rank and trainer.current_epoch in self.epochs and not self.batch:
                losses = losses + torch.tensor([torch.nan] + [0.0] * (len(losses) - 1))
            return losses, metrics

        pl_module.recipe.algorithm.loss = spoilt

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx


class Hungry:
    """A reward that runs out of memory."""

    def __init__(self, pictures: int) -> None:
        """pictures: number of images that are scored before."""
        self.left = pictures

    def __call__(self, media: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
        self.left -= len(media)
        if self.left < 0:
            torch.empty(2**60, dtype=torch.uint8)
        return media.flatten(1).mean(1)
