"""Ends all ranks soon after one has died, and says which."""

from __future__ import annotations

import signal
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from flowalign.checks.errors import one_line
from flowalign.stopping import Stopped
from flowalign.strategies.heartbeat import Heartbeat


class Ranks(Callback):
    """A rank that gives no sign of life for `limit` seconds during a stage of the Trainer counts as dead."""

    def __init__(self, limit: float = 30.0) -> None:
        self.limit = limit
        self.heart: Heartbeat | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module, stage
        if trainer.world_size == 1:
            return
        if self.heart is None:
            self.heart = Heartbeat(trainer.global_rank, trainer.world_size, self.limit, lambda: _ended(trainer))
            self.heart.connect(trainer.strategy.cluster_environment.main_address, trainer.strategy.broadcast)  # type: ignore
        self.heart.judge(True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module, stage
        if self.heart is not None:
            trainer.strategy.barrier("all ranks have ended well")
            self.heart.judge(False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        del trainer, pl_module
        if self.heart is None:
            return
        if _is_of_another_rank(exception):
            self.heart.join(self.limit + 5 * self.heart.period)  # it knows more than a broken connection tells
        self.heart.judge(False)
        if not isinstance(exception, Stopped) or exception.signal == signal.SIGINT:
            self.heart.tell(f"{type(exception).__name__}: {one_line(exception)}")


def _is_of_another_rank(exception: BaseException) -> bool:
    """Whether a collective failed, as it does where the connection to another rank breaks."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    told = isinstance(exception, RuntimeError) and any(word in str(exception) for word in words)
    return told or isinstance(exception, dist.DistError)


def _ended(trainer: Trainer) -> str:
    """Of the processes that Lightning has started here, the first that ended badly."""
    launcher: Any = trainer.strategy.launcher
    started = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
    for i, process in enumerate(started, trainer.global_rank + 1):
        if code := process.poll():
            return f"rank {i} (process {process.pid}) ended with {_meaning(code)}"
    return ""


def _meaning(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
