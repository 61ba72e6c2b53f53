"""Timing callbacks: the phases of epochs, the time to a quality, the time to the first optimiser step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from flowalign.report import Report

PHASES = ("rollout", "frozen", "optimise")


class Phases(Checkpoint, Report):
    """Seconds of every epoch, by phase: rollout, velocities of frozen copies, optimisation.

    Subclasses Checkpoint because Lightning calls such callbacks at the end of an epoch after the module, whose frozen
    copies are then updated. An evaluation would count as optimisation; the benchmarks switch it off.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """`before` and `after` are called around every epoch and are not timed."""
        self.clock, self.before, self.after = clock, before, after
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.report = self  # type: ignore[assignment]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before()
        self.stamp, self.consulting = self.clock(), 0.0

    def begin(self, phase: str, total: int) -> None:
        if phase == "frozen":  # once per copy, while the last rewards are pending
            self.asked = self.clock()
        elif phase == "optimise":
            self.seconds["frozen"].append(self.consulting)
            self.seconds["rollout"].append(self._lap() - self.consulting)

    def end(self, phase: str) -> None:
        if phase == "frozen":
            self.consulting += self.clock() - self.asked

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds["optimise"].append(self._lap())
        self.after()

    def _lap(self) -> float:
        """Seconds since the previous call."""
        began, self.stamp = self.stamp, self.clock()
        return self.stamp - began

    @property
    def epochs(self) -> list[float]:
        """Seconds of every epoch."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


class Course(Callback):
    """Records a metric at every evaluation of a run, with the seconds of training up to it.

    Everything in an epoch but evaluations counts as training. Training stops at the first evaluation that is at least
    `enough` above the baseline.
    """

    def __init__(self, path: str, metric: str, enough: float) -> None:
        self.path, self.metric, self.enough = Path(path), metric, enough
        self.seconds = 0.0
        self.points: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.base = pl_module.baseline[self.metric]
        self.pictures = len(pl_module.eval_prompts["val"])
        self._write()
        self.began = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.seconds += time.perf_counter() - self.began

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        value = float(trainer.callback_metrics[self.metric])
        self.points.append({"epoch": trainer.current_epoch + 1, "train_s": self.seconds, "value": value})
        self._write()
        trainer.should_stop = trainer.should_stop or value >= self.base + self.enough
        self.began = time.perf_counter()

    def _write(self) -> None:
        found = {"base": self.base, "pictures": self.pictures, "points": self.points}
        self.path.write_text(json.dumps(found, indent=2) + "\n")


class Moments(Callback):
    """Writes the Unix times of a run's milestones, and ends the process after the first optimiser step."""

    def __init__(self, path: str) -> None:
        self.path, self.moments = Path(path), {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.moments.setdefault("loaded", time.time())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.moments.setdefault("evaluated", time.time())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.moments.setdefault("rolled_out", time.time())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.global_step:
            self.path.write_text(json.dumps(self.moments | {"stepped": time.time()}) + "\n")
            os._exit(0)  # nothing that follows is measured
