"""Profile the phases of an epoch: traces, and tables of the most expensive operators."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from flowalign.checks.errors import ConfigError
from flowalign.module import AlignModule
from flowalign.report import Report

log = logging.getLogger("flowalign")


class Recording:
    """A profile of the next batches of a phase, each labelled with the phase's name."""

    def __init__(self, phase: str, batches: int | None) -> None:
        """batches: how many to record; None: until stopped."""
        self.phase, self.left = phase, math.inf if batches is None else batches
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profile = profile(activities=activities)
        self.profile.start()
        self.mark = self._open_mark()

    def _open_mark(self) -> record_function:
        mark = record_function(self.phase)
        mark.__enter__()
        return mark

    @property
    def stopped(self) -> bool:
        return self.left == 0

    def next(self) -> None:
        """End a batch and begin the next one."""
        if self.left == 1:
            self.stop()
        elif not self.stopped:
            self.mark.__exit__(None, None, None)
            self.mark, self.left = self._open_mark(), self.left - 1

    def stop(self) -> None:
        """Stop recording, unless it has stopped already."""
        if not self.stopped:
            self.mark.__exit__(None, None, None)
            self.profile.stop()
            self.left = 0

    def write(self, folder: Path, name: str, rows: int) -> None:
        """Write NAME.json.gz for chrome://tracing or Perfetto, and NAME.txt with the top `rows` operators."""
        folder.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(folder / f"{name}.json.gz"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (folder / f"{name}.txt").write_text(self.profile.key_averages().table(sort_by=by, row_limit=rows))


class ProfilingReport(Report):
    """Forwards the module's progress to another report and to the profiler."""

    def __init__(self, to: Report, profiler: Profiler) -> None:
        self.to, self.profiler = to, profiler

    def begin(self, phase: str, total: int) -> None:
        self.to.begin(phase, total)
        self.profiler.begin(phase)

    def advance(self, phase: str, done: int, **values: float) -> None:
        self.to.advance(phase, done, **values)
        if phase != "optimise":  # its progress is reported before the backward pass
            self.profiler.next(phase)

    def end(self, phase: str) -> None:
        self.to.end(phase)


class Profiler(Callback):
    """Profiles the first batches of rollout, frozen copies and optimisation in the given epochs, on rank 0."""

    def __init__(
        self,
        folder: str,
        epochs: Sequence[int] = (1,),
        batches: int | None = 2,
        micro_batches: int | None = 8,
        rows: int = 40,
    ) -> None:
        """epochs: counted from 0. batches: of the rollout and of the frozen copies. micro_batches: of the optimisation.
        None means all of them. rows: operators in a table.
        """
        if not epochs or min(epochs) < 0:
            raise ValueError(f"callbacks.profiler.epochs are numbers from 0 on, e.g. [1] (got {list(epochs)}).")
        for name, number in (("batches", batches), ("micro_batches", micro_batches), ("rows", rows)):
            if number is not None and number < 1:
                raise ValueError(f"callbacks.profiler.{name} must be at least 1 (got {number}).")
        self.folder, self.epochs, self.rows = Path(folder), sorted(epochs), rows
        self.limits = {"rollout": batches, "frozen": batches, "optimise": micro_batches}
        self.recordings: dict[str, Recording] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module
        last = trainer.max_epochs or -1
        if stage == "fit" and 0 < last <= self.epochs[0]:
            raise ConfigError(
                f"callbacks.profiler.epochs={self.epochs} counts from 0, and a run with trainer.max_epochs={last} "
                f"reaches none of these epochs: use callbacks.profiler.epochs=[{last - 1}]."
            )

    # ------------------------------------------------------------ the epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wanted = trainer.is_global_zero and trainer.current_epoch in self.epochs
        if wanted and isinstance(pl_module, AlignModule):
            pl_module.report = ProfilingReport(pl_module.report, self)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *others: Any) -> None:
        self.next("optimise")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        for phase, recording in self.recordings.items():
            recording.write(self.folder, f"epoch{trainer.current_epoch:03d}_{phase}", self.rows)
        if self.recordings:
            log.info("profiles of %s are in %s", ", ".join(self.recordings), self.folder)
        self._reset(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()
        self._reset(pl_module)

    def _reset(self, pl_module: LightningModule) -> None:
        self.recordings.clear()
        if isinstance(pl_module, AlignModule) and isinstance(pl_module.report, ProfilingReport):
            pl_module.report = pl_module.report.to

    # ------------------------------------------------------------ the phases

    def begin(self, phase: str) -> None:
        """Record a phase; of several passes in an epoch, as with two frozen copies, only the first."""
        self._stop()
        if phase in self.limits and phase not in self.recordings:
            self.recordings[phase] = Recording(phase, self.limits[phase])

    def next(self, phase: str) -> None:
        """End a batch of the phase."""
        if phase in self.recordings:
            self.recordings[phase].next()

    def _stop(self) -> None:
        for recording in self.recordings.values():
            recording.stop()
