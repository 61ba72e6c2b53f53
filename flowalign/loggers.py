"""Loggers that go on in the folder of the run that they continue, as if it had never stopped.

Lightning's CSV logger removes the file that it finds, TensorBoard shows twice what an interrupted run had logged beyond
its checkpoint, and W&B and MLflow begin a new run.
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
    """Hides what lies beyond the checkpoint."""

    def save(self) -> None:
        """Not before the settings are there: an empty hparams.yaml would never be filled."""
        if self.hparams:
            super().save()

    def continue_after(self, step: int, run: str | None) -> None:
        """To be called before anything is logged; run: the `version` of the logger in the run that is continued."""
        del run
        # Not from `step` on: the validation before the checkpoint has this step. Of the epoch that begins at it, only
        # the rollout's points can be there twice, with equal rewards.
        self._kwargs["purge_step"] = step + 1

    def show(self, name: str, images: np.ndarray, step: int) -> None:
        """Images (B, H, W, 3) uint8."""
        self.experiment.add_images(name, images, step, dataformats="NHWC")


class Csv(CSVLogger):
    """Keeps the rows up to the checkpoint."""

    def continue_after(self, step: int, run: str | None) -> None:
        """To be called before anything is logged."""
        del run
        rows = read(Path(self.log_dir) / "metrics.csv")
        self.experiment.metrics = [row for row in rows if not _is_repeated(row, step)]
        self.experiment.save()


class Wandb(WandbLogger):
    """Goes on with the W&B run whose id the checkpoint holds, wherever the output folder is.

    Nothing of it is taken back or refused: W&B counts calls, and the optimiser step is a value beside others, against
    which the charts are drawn. So what an interrupted run had logged beyond its checkpoint is there twice.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run at W&B, which begins when first asked for."""
        import wandb  # type: ignore[import-not-found]

        try:
            return super().experiment
        except wandb.errors.Error as error:
            raise ConfigError(
                f"logger=wandb: {one_line(error)} logger.wandb.offline=true keeps everything in the output folder, for "
                "`wandb sync` later."
            ) from error

    def continue_after(self, step: int, run: str | None) -> None:
        """To be called before anything is logged; an id that the config gives has the last word."""
        del step
        self._id = self._wandb_init["id"] = self._id or run

    def show(self, name: str, images: np.ndarray, step: int) -> None:
        """Images (B, H, W, 3) uint8."""
        self.log_image(name, list(images), step)

    def close(self, failed: bool) -> None:
        """Otherwise the next run of a sweep would log into this one."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None


class MLFlow(MLFlowLogger):
    """Goes on with the MLflow run whose id the checkpoint holds; what was logged beyond that is there twice."""

    def continue_after(self, step: int, run: str | None) -> None:
        """To be called before anything is logged; an id that the config gives has the last word."""
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
        """Without those that the run has already: MLflow refuses to change a parameter."""
        if rank_zero_only.rank == 0:
            known = self.experiment.get_run(self.run_id).data.params
            super().log_hyperparams({key: value for key, value in params.items() if key not in known})

    def show(self, name: str, images: np.ndarray, step: int) -> None:
        """Images (B, H, W, 3) uint8."""
        for i, image in enumerate(images):
            key = name if len(images) == 1 else f"{name}/{i}"
            self.experiment.log_image(self.run_id, image, key=key, step=step)

    def finalize(self, status: str = "success") -> None:
        """Not yet: Lightning calls this after every evaluation."""

    def close(self, failed: bool) -> None:
        super().finalize("failed" if failed else "success")


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
    frame = read_split(Path(checkpoint))[0]
    runs = frame.get("flowalign", {}).get("logs", {})
    for logger in loggers:
        if isinstance(logger, (TensorBoard, Csv, Wandb, MLFlow)):
            logger.continue_after(int(frame["global_step"]), runs.get(type(logger).__name__))


def runs_of(loggers: Iterable[Logger]) -> dict[str, str]:
    """What `continue_logs` has to find in a checkpoint: the ids of runs that are kept elsewhere; rank 0 knows them."""
    elsewhere = [logger for logger in loggers if isinstance(logger, (Wandb, MLFlow))]
    return {type(logger).__name__: logger.version for logger in elsewhere if logger.version}


def show(loggers: Iterable[Logger], name: str, images: np.ndarray, step: int) -> None:
    """Images (B, H, W, 3) uint8 to every logger that takes any; on rank 0 only."""
    for logger in loggers:
        if isinstance(logger, (TensorBoard, Wandb, MLFlow)):
            logger.show(name, images, step)


def log_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Flat, plain values, but for W&B, whose names of settings should have no dots."""
    flat = flatten(settings)
    for logger in loggers:
        if isinstance(logger, TensorBoard):
            logger.log_hyperparams(flat, {"hp/val_reward": math.nan})
        elif isinstance(logger, Wandb):
            logger.log_hyperparams(dict(settings))
        else:
            logger.log_hyperparams(flat)


@contextmanager
def closed(loggers: Iterable[Logger]) -> Iterator[None]:
    """Tells those that keep runs elsewhere how this one has ended."""
    failed = True
    try:
        yield
        failed = False
    finally:
        for logger in loggers:
            if isinstance(logger, (Wandb, MLFlow)):
                logger.close(failed)
