"""Loggers that go on in the folder of the run that they continue, as if it had never stopped.

Lightning's CSV logger removes the file that it finds, and TensorBoard shows twice what an interrupted run had logged
beyond its checkpoint.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flowalign.strategies.folders import opened


class TensorBoard(TensorBoardLogger):
    """Hides what lies beyond the checkpoint."""

    def continue_after(self, step: int) -> None:
        """To be called before anything is logged."""
        # Not from `step` on: the validation before the checkpoint has this step. Of the epoch that begins at it, only
        # the rollout's points can be there twice, with equal rewards.
        self._kwargs["purge_step"] = step + 1


class Csv(CSVLogger):
    """Keeps the rows up to the checkpoint."""

    def continue_after(self, step: int) -> None:
        """To be called before anything is logged."""
        rows = read(Path(self.log_dir) / "metrics.csv")
        self.experiment.metrics = [row for row in rows if not _is_repeated(row, step)]
        self.experiment.save()


def read(file: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv, each with the columns that it has a value for."""
    if not file.is_file():
        return []
    with file.open(newline="") as text:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(text)]


def _is_repeated(row: dict[str, str], step: int) -> bool:
    """Whether the continued run will log it: what is later, and the rollout of the epoch that begins."""
    at = int(row["step"])
    return at > step or (at == step and any(key.startswith("rollout/") for key in row))


@rank_zero_only
def continue_logs(loggers: Iterable[Logger], checkpoint: str | Path | None) -> None:
    """Prepares the loggers of a run for going on from this checkpoint, if from any."""
    if checkpoint is None:
        return
    step = int(opened(Path(checkpoint))[0]["global_step"])
    for logger in loggers:
        if isinstance(logger, (TensorBoard, Csv)):
            logger.continue_after(step)
