"""Stops on a signal to any rank, with all ranks together and where nothing is lost."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from flowalign.module import AlignModule
from flowalign.stopping import Stopped, asked

log = logging.getLogger("flowalign")


class Preemption(Callback):
    """An optimisation phase, or the evaluation after it, is finished if that takes no longer than `grace` seconds from
    the signal on; the checkpoint is then written as ever. A rollout, a phase that would take longer, any evaluation
    before or after the training, and anything after a second signal end between two batches: the last checkpoint
    stands, and the epoch is repeated from it.
    """

    def __init__(self, grace: float = 25.0) -> None:
        """grace: what the scheduler grants before it kills, less the time to write a checkpoint."""
        self.grace = grace
        self.began = 0.0
        self.announced = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del stage
        if isinstance(pl_module, AlignModule):
            pl_module.between_batches = partial(self._look, trainer)

    # ------------------------------------------------------------ who listens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked.heed(True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked.heed(True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked.heed(True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        asked.heed(False)

    # ------------------------------------------------------------ where all ranks come by

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)  # the last checkpoint is written, and the rollout has not begun

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done, total = batch_idx + 1, trainer.num_training_batches
        # Micro-batches between two steps wait for no other rank, and are not to wait for this.
        if trainer.world_size == 1 or done % trainer.accumulate_grad_batches == 0 or done == total:
            self._look(trainer, self._left(done, total))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        within = trainer.state.fn == TrainerFn.FITTING
        self._look(trainer, self._left(batch_idx + 1, trainer.num_val_batches[dataloader_idx]) if within else math.inf)

    def on_test_batch_end(self, trainer: Trainer, *others: Any) -> None:
        self._look(trainer)

    def _left(self, done: int, total: float) -> float:
        """Seconds that the rest of a phase will take, if it goes on as it began."""
        return (time.monotonic() - self.began) / done * (total - done)

    # ------------------------------------------------------------ the decision

    def _look(self, trainer: Trainer, left: float = math.inf) -> None:
        """Raises Stopped on all ranks if one of them was asked to stop and finishing (`left` seconds) is too much."""
        too_long = left > 0 and asked.age + left > self.grace
        number, at_once = self._agreed(trainer, asked.number, bool(asked.number) and (asked.times > 1 or too_long))
        if number and at_once:
            raise Stopped(number)
        if number and trainer.is_global_zero and not self.announced:
            self.announced = True
            log.warning("asked to stop: the epoch is finished first, in about %.0f s; once more stops at once", left)

    @staticmethod
    def _agreed(trainer: Trainer, *mine: int) -> list[int]:
        """The largest of each on any rank."""
        if trainer.world_size == 1:
            return list(mine)
        theirs = torch.tensor(mine, device=trainer.strategy.root_device)
        dist.all_reduce(theirs, dist.ReduceOp.MAX)
        return theirs.tolist()
