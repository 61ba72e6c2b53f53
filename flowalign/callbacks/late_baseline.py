"""The test prompts' share of the baseline, after the first epoch: training need not wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from lightning import Callback, LightningModule, Trainer

from flowalign.module import AlignModule


class LateBaseline(Callback):
    """Evaluates the test prompts with the weights that the fit began with, and logs that as step 0.

    It does so at the end of the first epoch and before its checkpoint: a continued run has the whole baseline, or
    repeats that epoch. By then a frozen copy may still hold these weights; if none does, one waits in the machine's
    memory.
    """

    def __init__(self, told: Callable[[dict[str, float], float], None]) -> None:
        """told: called with the metrics and the seconds that they took."""
        self.told = told
        self.copy = ""
        self.waiting = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, AlignModule):
            self.copy = unmoved(pl_module) or "start"
            if self.copy == "start":
                pl_module.live.keep("start")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The module's own hook, in which copies follow the live weights, comes after those of callbacks.
        if self.waiting and isinstance(pl_module, AlignModule):
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_epoch_end(trainer, pl_module)  # where no epoch came to its end

    def _evaluate(self, trainer: Trainer, module: AlignModule) -> None:
        began = time.perf_counter()
        found = module.evaluate_test(self.copy)
        module.live.let_go(self.copy)
        self.waiting = False
        for logger in trainer.loggers:
            logger.log_metrics(found, step=0)
        self.told(found, time.perf_counter() - began)


def unmoved(module: AlignModule) -> str:
    """A frozen copy that the first epoch leaves alone."""
    follows = module.recipe.frozen
    return next((n for n in module.live.copies if n not in follows or follows[n].every == "rollout"), "")
