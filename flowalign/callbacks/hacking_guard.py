"""Detect reward hacking."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flowalign.checks.errors import ConfigError

log = logging.getLogger("flowalign")


@dataclass
class Best:
    """The evaluation with the highest gold measure so far."""

    gold: float
    objective: float
    epoch: int
    """Counted from 0; -1 for the baseline."""

    def __str__(self) -> str:
        return "before training" if self.epoch < 0 else f"after epoch {self.epoch}"


class HackingGuard(Callback):
    """Compares the objective with a gold measure, which is never optimised, at every evaluation.

    The reward counts as hacked once, for `patience` evaluations in a row, gold is more than `tolerance` below its best
    while the objective is above its value at that best. Warns once, with the numbers, and logs `val/hacked`.
    """

    def __init__(
        self,
        objective: str = "val/reward",
        gold: str = "val/quality",
        tolerance: float = 0.02,
        patience: int = 2,
        stop: bool = False,
    ) -> None:
        if tolerance < 0 or patience < 1:
            raise ValueError(f"tolerance is 0 or more and patience at least 1 (got {tolerance} and {patience}).")
        self.objective, self.gold = objective, gold
        self.tolerance, self.patience, self.stop = tolerance, patience, stop
        self.best: Best | None = None
        self.strikes = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the baseline and the evaluations during training; the final evaluation repeats one of these."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting or (self.best is None and trainer.global_step == 0):
            objective, gold = self._read(trainer, self.objective), self._read(trainer, self.gold)
            hacked = self.judge(objective, gold, trainer.current_epoch if fitting else -1)
            for logger in trainer.loggers:
                logger.log_metrics({"val/hacked": float(hacked)}, step=trainer.global_step)
            if hacked and self.stop:
                trainer.should_stop = True

    def _read(self, trainer: Trainer, name: str) -> float:
        metrics = trainer.callback_metrics
        if name not in metrics:
            raise ConfigError(f"the hacking guard asks for {name}, and there are {', '.join(sorted(metrics))}.")
        return float(metrics[name])

    def judge(self, objective: float, gold: float, epoch: int) -> bool:
        """Whether the reward counts as hacked after this evaluation. NaN changes nothing."""
        if math.isnan(gold) or math.isnan(objective):
            return self.strikes >= self.patience
        if self.best is None or gold > self.best.gold:
            self.best, self.strikes = Best(gold, objective, epoch), 0
            return False
        suspicious = gold < self.best.gold - self.tolerance and objective > self.best.objective
        self.strikes = self.strikes + 1 if suspicious else 0
        if self.strikes == self.patience:
            self._warn(self.best, objective, gold)
        return self.strikes >= self.patience

    @rank_zero_only
    def _warn(self, best: Best, objective: float, gold: float) -> None:
        log.warning(
            "the reward is being hacked: %s rose from %.3f to %.3f while %s fell from %.3f (%s) to %.3f, by more than "
            "%g in %d evaluations in a row. Go back to the best checkpoint by %s, weigh the objective against "
            "something that sees what is lost, or raise algo.kl_beta.",
            *(self.objective, best.objective, objective, self.gold, best.gold, best, gold),
            *(self.tolerance, self.patience, self.gold),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": None if self.best is None else asdict(self.best), "strikes": self.strikes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = None if state_dict["best"] is None else Best(**state_dict["best"])
        self.strikes = state_dict["strikes"]
