"""Show progress: a bar per phase on a terminal, and one line per epoch everywhere."""

from __future__ import annotations

import sys
import time

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flowalign.module import AlignModule
from flowalign.report import Report

MOSTLY_EQUAL = 0.9
"""Share of groups without a difference in reward above which an epoch's line shows it: hardly anything is learnt."""


class Bars(Report):
    """A rich progress bar for each phase, with its latest values beside it."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)
        self.tasks: dict[str, TaskID] = {}
        self.title = ""

    def begin(self, phase: str, total: int) -> None:
        self.progress.start()
        self.tasks[phase] = self.progress.add_task(f"{self.title}{phase:9}", total=total, note="")

    def advance(self, phase: str, done: int, **values: float) -> None:
        if phase in self.tasks:
            note = "  ".join(f"{name} so far {value:.3f}" for name, value in values.items())
            self.progress.update(self.tasks[phase], completed=done, note=note)

    def end(self, phase: str) -> None:
        if phase in self.tasks:
            self.progress.remove_task(self.tasks.pop(phase))
        if not self.tasks:
            self.progress.stop()


class PhaseProgress(Callback):
    """Shows the progress of each phase with the reward so far, and prints a line for every finished epoch."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self.bars: Bars | None = None
        self.began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del stage
        if isinstance(pl_module, AlignModule) and trainer.is_global_zero and sys.stderr.isatty():
            pl_module.report = self.bars = Bars(self.console)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module
        self.began = time.perf_counter()
        if self.bars is not None:
            self.bars.title = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} "

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics  # on every rank, since Lightning averages them over the ranks when asked
        if not trainer.is_global_zero or not isinstance(pl_module, AlignModule):
            return
        # Given images (algorithms without rollouts) have no reward.
        shown = [f"reward {pl_module.stats['reward_mean']:.3f}"] if "reward_mean" in pl_module.stats else []
        if pl_module.stats.get("reward_nan_fraction"):
            shown.append(f"not scored {pl_module.stats['reward_nan_fraction']:.1%}")
        if pl_module.stats.get("zero_std_fraction", 0) > MOSTLY_EQUAL:
            shown.append(f"groups of equal rewards {pl_module.stats['zero_std_fraction']:.1%}")
        for key, name in (
            ("train/loss", "loss"),
            ("train/ratio", "ratio"),
            ("val/reward", "val/reward"),
            ("val/strict", "val/strict"),
        ):
            if key in metrics and (not key.startswith("val") or pl_module.evaluated_at == trainer.current_epoch):
                shown.append(f"{name} {float(metrics[key]):.4g}")
        seconds = time.perf_counter() - self.began
        self.console.print(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  {'  '.join(shown)}  ({seconds:.1f} s)",
            soft_wrap=True,
        )
