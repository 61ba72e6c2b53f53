"""Log the hyperparameters of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from flowalign.loggers import log_settings
from flowalign.module import AlignModule


class Hyperparameters(Callback):
    """Logs the config and the parameter counts once, as soon as the policy is built and before any metric."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.waiting = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.waiting and isinstance(pl_module, AlignModule):
            numbers = pl_module.live.parameter_counts()
            counts = {"parameters": {"trained": numbers["trained"], "all": numbers["parameters"]}}
            log_settings(trainer.loggers, {**self.settings, **counts})
            self.waiting = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)
