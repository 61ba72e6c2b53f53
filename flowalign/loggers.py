"""Loggers that continue the logs of a resumed run as if it had never stopped.

Lightning's CSV logger deletes an existing file, TensorBoard shows twice what an interrupted run had logged beyond its
checkpoint, and W&B and MLflow start a new run.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flowalign.checks.errors import ConfigError, one_line
from flowalign.settings import flatten
from flowalign.strategies.folders import read_split


class TensorBoard(TensorBoardLogger):
    """TensorBoard logger that purges what was logged beyond the checkpoint."""

    def save(self) -> None:
        """Save once the hyperparameters are known: an empty hparams.yaml would never be overwritten."""
        if self.hparams:
            super().save()

    def continue_after(self, step: int, run: str | None) -> None:
        """Call this before anything is logged. run: the logger's `version` in the run that is resumed."""
        del run
        # Not from `step` on, which is also the step of the validation before the checkpoint. Of the epoch that begins
        # there, only the rollout's points may appear twice, with equal rewards.
        self._kwargs["purge_step"] = step + 1

    def log_images(self, name: str, images: np.ndarray, step: int) -> None:
        """Images (B, H, W, 3) uint8."""
        self.experiment.add_images(name, images, step, dataformats="NHWC")


class Csv(CSVLogger):
    """CSV logger that keeps the rows up to the checkpoint."""

    def continue_after(self, step: int, run: str | None) -> None:
        """Call this before anything is logged."""
        del run
        rows = read_csv(Path(self.log_dir) / "metrics.csv")
        self.experiment.metrics = [row for row in rows if not _is_repeated(row, step)]
        self.experiment.save()


class Wandb(WandbLogger):
    """W&B logger that resumes the run whose id the checkpoint holds, wherever the output folder is.

    Points logged beyond the checkpoint stay and appear twice: W&B's own step counts calls, and the optimiser step is
    an ordinary value, against which the charts are drawn.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, which starts on first access."""
        import wandb  # type: ignore[import-not-found]

        try:
            return super().experiment
        except wandb.errors.Error as error:
            raise ConfigError(
                f"logger=wandb: {one_line(error)} logger.wandb.offline=true keeps everything in the output folder, for "
                "`wandb sync` later."
            ) from error

    def continue_after(self, step: int, run: str | None) -> None:
        """Call this before anything is logged. An id from the config takes precedence."""
        del step
        self._id = self._wandb_init["id"] = self._id or run

    def log_images(self, name: str, images: np.ndarray, step: int) -> None:
        """Images (B, H, W, 3) uint8."""
        self.log_image(name, list(images), step)

    def close(self, failed: bool) -> None:
        """Finish the run; otherwise the next run of a sweep would log into it."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None


class MLFlow(MLFlowLogger):
    """MLflow logger that resumes the run whose id the checkpoint holds; points logged beyond it appear twice."""

    def continue_after(self, step: int, run: str | None) -> None:
        """Call this before anything is logged. An id from the config takes precedence."""
        from mlflow.exceptions import MlflowException  # type: ignore[import-not-found]

        del step
        self._run_id = self._run_id or run
        if self._run_id is None:
            return
        try:
            self._mlflow_client.update_run(self._run_id, status="RUNNING")
        except MlflowException as error:
            raise ConfigError(
                f"logger=mlflow: {self._tracking_uri} has no run {self._run_id}, which the checkpoint goes on with; "
                "give logger.mlflow.tracking_uri as before, or log elsewhere."
            ) from error

    def log_hyperparams(self, params: Any) -> None:
        """Log only parameters that the run does not have yet, since MLflow rejects changes."""
        if rank_zero_only.rank == 0:
            known = self.experiment.get_run(self.run_id).data.params
            super().log_hyperparams({key: value for key, value in params.items() if key not in known})

    def log_images(self, name: str, images: np.ndarray, step: int) -> None:
        """Images (B, H, W, 3) uint8."""
        for i, image in enumerate(images):
            key = name if len(images) == 1 else f"{name}/{i}"
            self.experiment.log_image(self.run_id, image, key=key, step=step)

    def finalize(self, status: str = "success") -> None:
        """Do nothing, since Lightning calls this after every evaluation; `close` finalizes the run."""

    def close(self, failed: bool) -> None:
        super().finalize("failed" if failed else "success")


def read_csv(file: Path) -> list[dict[str, str]]:
    """Read the rows of a metrics.csv, each without its empty columns."""
    if not file.is_file():
        return []
    with file.open(newline="") as text:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(text)]


def _is_repeated(row: dict[str, str], step: int) -> bool:
    """Whether the resumed run logs this row again: later steps, and the rollout of the epoch that begins at `step`."""
    at = int(row["step"])
    return at > step or (at == step and any(key.startswith("rollout/") for key in row))


@rank_zero_only
def continue_logs(loggers: Iterable[Logger], checkpoint: str | Path | None) -> None:
    """Prepare the loggers of a run that resumes from this checkpoint, if it resumes from one."""
    if checkpoint is None:
        return
    frame = read_split(Path(checkpoint))[0]
    runs = frame.get("flowalign", {}).get("logs", {})
    for logger in loggers:
        if isinstance(logger, (TensorBoard, Csv, Wandb, MLFlow)):
            logger.continue_after(int(frame["global_step"]), runs.get(type(logger).__name__))


def external_run_ids(loggers: Iterable[Logger]) -> dict[str, str]:
    """Ids of W&B and MLflow runs by logger class, for the checkpoint that `continue_logs` reads; known on rank 0."""
    external = [logger for logger in loggers if isinstance(logger, (Wandb, MLFlow))]
    return {type(logger).__name__: logger.version for logger in external if logger.version}


def log_images(loggers: Iterable[Logger], name: str, images: np.ndarray, step: int) -> None:
    """Log images (B, H, W, 3) uint8 to every logger that supports them; call on rank 0 only."""
    for logger in loggers:
        if isinstance(logger, (TensorBoard, Wandb, MLFlow)):
            logger.log_images(name, images, step)


def log_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Log the settings as flat, plain values; nested for W&B, whose config keys should have no dots."""
    flat = flatten(settings)
    for logger in loggers:
        if isinstance(logger, TensorBoard):
            logger.log_hyperparams(flat, {"hp/val_reward": math.nan})
        elif isinstance(logger, Wandb):
            logger.log_hyperparams(dict(settings))
        else:
            logger.log_hyperparams(flat)


@contextmanager
def closing(loggers: Iterable[Logger]) -> Iterator[None]:
    """On exit, mark the W&B and MLflow runs as finished or failed."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in loggers:
            if isinstance(logger, (Wandb, MLFlow)):
                logger.close(failed)
