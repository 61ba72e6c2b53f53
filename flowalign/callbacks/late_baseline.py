"""Measure the baseline on the test prompts after the first epoch, so that training need not wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from lightning import Callback, LightningModule, Trainer

from flowalign.module import AlignModule


class LateBaseline(Callback):
    """Evaluates the test prompts with the initial weights and logs the metrics at step 0.

    Runs at the end of the first epoch, before its checkpoint: a resumed run either has the whole baseline or repeats
    that epoch. By then a frozen copy may still hold the initial weights; if none does, a copy is kept in CPU memory.
    """

    def __init__(self, on_result: Callable[[dict[str, float], float], None]) -> None:
        """on_result: called with the metrics and the seconds that they took."""
        self.on_result = on_result
        self.copy = ""
        self.waiting = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, AlignModule):
            self.copy = unchanged_copy(pl_module) or "start"
            if self.copy == "start":
                pl_module.live.take_snapshot("start")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module's own hook, which updates frozen copies, runs after those of callbacks.
        if self.waiting and isinstance(pl_module, AlignModule):
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_end(trainer, pl_module)  # if no epoch was completed

    def _evaluate(self, trainer: Trainer, module: AlignModule) -> None:
        began = time.perf_counter()
        metrics = module.evaluate_test(self.copy)
        module.live.drop_snapshot(self.copy)
        self.waiting = False
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=0)
        self.on_result(metrics, time.perf_counter() - began)


def unchanged_copy(module: AlignModule) -> str:
    """Name of a frozen copy that still holds the initial weights at the end of the first epoch, or ""."""
    follows = module.recipe.frozen
    return next((n for n in module.live.copies if n not in follows or follows[n].every == "rollout"), "")
