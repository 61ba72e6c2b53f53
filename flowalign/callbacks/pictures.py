"""Log image grids of fixed prompts and seeds to TensorBoard, W&B and MLflow; their slider shows the progress."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from flowalign.evaluation import stills
from flowalign.grid import grid
from flowalign.loggers import log_images
from flowalign.module import AlignModule
from flowalign.rewards.pixels import as_bytes


class Pictures(Callback):
    """Logs `val/pictures` at every evaluation, including the baseline, together with `rollout/pictures`."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, AlignModule) or not trainer.is_global_zero:
            return
        if shown := pl_module.shown.get("val"):
            log_images(trainer.loggers, "val/pictures", grid(shown)[None], trainer.global_step)
        if pl_module.rollout_shown is not None:
            images = as_bytes(stills(pl_module.rollout_shown[:16]))
            log_images(trainer.loggers, "rollout/pictures", images, trainer.global_step)
