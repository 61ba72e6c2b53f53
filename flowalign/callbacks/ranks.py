"""End all ranks soon after one has died, and report which one; let none take part in another run than rank 0's."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from flowalign.checks.errors import ConfigError, one_line
from flowalign.module import AlignModule
from flowalign.settings import differences, flatten
from flowalign.stopping import Stopped
from flowalign.strategies.heartbeat import Heartbeat

OWN = ("paths.", "logger.", "task_name")
"""Prefixes of settings in which ranks may differ: only rank 0 uses them, and they may name the time or the machine."""


class Ranks(Callback):
    """Monitors all ranks; one whose heartbeat stops for `limit` seconds during a Trainer stage counts as dead."""

    def __init__(self, limit: float = 30.0) -> None:
        self.limit = limit
        self.heartbeat: Heartbeat | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del stage
        if trainer.world_size == 1:
            return
        if self.heartbeat is None:
            # Its thread lives as long as the process and must not keep the trainer of a sweep's finished run, and with
            # it the networks.
            rank, launcher = trainer.global_rank, trainer.strategy.launcher
            self.heartbeat = Heartbeat(rank, trainer.world_size, self.limit, lambda: _failed_process(launcher, rank))
            address = trainer.strategy.cluster_environment.main_address  # type: ignore
            self.heartbeat.connect(address, trainer.strategy.broadcast)  # type: ignore
        self.heartbeat.watch(True)
        if isinstance(pl_module, AlignModule):
            check_same_run(trainer, pl_module.recipe.config)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        del pl_module, stage
        if self.heartbeat is not None:
            trainer.strategy.barrier("all ranks have ended well")
            self.heartbeat.watch(False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        del trainer, pl_module
        if self.heartbeat is None:
            return
        if _is_collective_failure(exception):
            # The heartbeat ends this process with the reason, which a broken connection does not tell.
            self.heartbeat.join(self.limit + 5 * self.heartbeat.period)
        self.heartbeat.watch(False)
        if not isinstance(exception, Stopped) or exception.signal == signal.SIGINT:
            self.heartbeat.report_failure(f"{type(exception).__name__}: {one_line(exception)}")


def check_same_run(trainer: Trainer, config: Mapping[str, Any]) -> None:
    """Raise ConfigError on a rank that is in another run than rank 0, with which it would be mixed unnoticed.

    That is a rank with other settings (names of logs, paths and addresses may be its own), or without the checkpoint.
    """
    own = {name: value for name, value in flatten(config).items() if "/" not in str(value)}
    own["resumes"] = trainer.ckpt_path is not None
    if found := differences(trainer.strategy.broadcast(own), own, may_differ=OWN):
        raise ConfigError(
            f"rank {trainer.global_rank} was to do another run than rank 0: {'; '.join(found)}. Every process needs "
            "the same command line and the same checkpoint, and in a sweep none of them may have failed alone."
        )


def _is_collective_failure(exception: BaseException) -> bool:
    """Whether a collective failed, as it does when the connection to another rank breaks."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    named = isinstance(exception, RuntimeError) and any(word in str(exception) for word in words)
    return named or isinstance(exception, dist.DistError)


def _failed_process(launcher: Any, rank: int) -> str:
    """Describe the first process started by this rank's launcher, Lightning's, that exited with an error, or ""."""
    started = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
    for i, process in enumerate(started, rank + 1):
        if code := process.poll():
            return f"rank {i} (process {process.pid}) ended with {_describe(code)}"
    return ""


def _describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
