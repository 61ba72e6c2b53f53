"""Stop all ranks together, at a point where nothing is lost, when any of them receives a signal."""

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
from flowalign.stopping import Stopped, stop_requests

log = logging.getLogger("flowalign")


class Preemption(Callback):
    """Finishes the epoch after a signal if there is time, and otherwise stops between two batches.

    An optimisation phase, or the evaluation after it, is finished if it ends within `grace` seconds of the signal; the
    checkpoint is then written as usual. A rollout, a longer phase, any evaluation before or after training, and
    anything after a second signal stop between two batches: the epoch is repeated from the last checkpoint.
    """

    def __init__(self, grace: float = 25.0) -> None:
        """grace: seconds between the scheduler's signal and its kill, less the time to write a checkpoint."""
        self.grace = grace
        self.began = 0.0
        self.announced = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del stage
        if isinstance(pl_module, AlignModule):
            pl_module.between_batches = partial(self._check, trainer)

    # ------------------------------------------------------------ while signals are polled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_requests.set_polled(True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_requests.set_polled(True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stop_requests.set_polled(True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        stop_requests.set_polled(False)

    # ------------------------------------------------------------ where all ranks synchronise

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)  # the last checkpoint is written and the rollout has not begun

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done, total = batch_idx + 1, trainer.num_training_batches
        # Ranks synchronise only at optimiser steps: a check at every micro-batch would add a wait.
        if trainer.world_size == 1 or done % trainer.accumulate_grad_batches == 0 or done == total:
            self._check(trainer, self._remaining(done, total))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        within = trainer.state.fn == TrainerFn.FITTING
        total = trainer.num_val_batches[dataloader_idx]
        self._check(trainer, self._remaining(batch_idx + 1, total) if within else math.inf)

    def on_test_batch_end(self, trainer: Trainer, *others: Any) -> None:
        self._check(trainer)

    def _remaining(self, done: int, total: float) -> float:
        """Estimated seconds until the phase ends, at its pace so far."""
        return (time.monotonic() - self.began) / done * (total - done)

    # ------------------------------------------------------------ the decision

    def _check(self, trainer: Trainer, remaining: float = math.inf) -> None:
        """Raise Stopped on all ranks if any was asked to stop and finishing takes too long (`remaining` seconds)."""
        too_long = remaining > 0 and stop_requests.age + remaining > self.grace
        at_once = bool(stop_requests.number) and (stop_requests.times > 1 or too_long)
        number, at_once = self._max_over_ranks(trainer, stop_requests.number, at_once)
        if number and at_once:
            raise Stopped(number)
        if number and trainer.is_global_zero and not self.announced:
            self.announced = True
            log.warning(
                "asked to stop: finishing the epoch first, in about %.0f s; a second signal stops at once", remaining
            )

    @staticmethod
    def _max_over_ranks(trainer: Trainer, *values: int) -> list[int]:
        if trainer.world_size == 1:
            return list(values)
        reduced = torch.tensor(values, device=trainer.strategy.root_device)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return reduced.tolist()
