"""Callbacks that read the clock: phases of epochs, the way to a quality, the way to the first step."""

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

    Formally a Checkpoint: such a callback hears of the end of an epoch after the module, whose copies have then
    followed. An evaluation would count as optimisation; measuring programs switch it off.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """before and after every epoch these are called, outside of its time."""
        self.clock, self.before, self.after = clock, before, after
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.report = self  # type: ignore[assignment]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before()
        self.stamp, self.consulting = self.clock(), 0.0

    def begin(self, phase: str, total: int) -> None:
        if phase == "frozen":  # once a copy, while the last rewards of the rollout are on their way
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
        """Seconds since the last one."""
        began, self.stamp = self.stamp, self.clock()
        return self.stamp - began

    @property
    def epochs(self) -> list[float]:
        """Seconds of every epoch."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]


class Course(Callback):
    """Writes what a measure was at every evaluation of a training, and the seconds of training up to it.

    Evaluations do not count as training; whatever else happens in an epoch does. The training stops at an evaluation
    that is `enough` above the baseline.
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
    """Writes when a run has come how far, in seconds since 1970, and ends the process at its first optimiser step."""

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
