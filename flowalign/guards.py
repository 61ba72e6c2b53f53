"""Guards of the optimisation phase: non-finite losses, malformed losses, and ratios that are off policy."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import Tensor

from flowalign.algorithms.base import Algorithm
from flowalign.checks.errors import ConfigError, RunError
from flowalign.types import Point

log = logging.getLogger("flowalign")


class NotFiniteError(RunError):
    """More optimiser steps than allowed had a non-finite loss or gradient."""


class FiniteGuard:
    """Skips optimiser steps with non-finite losses or gradients, up to a limit per run."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        """Steps skipped in the whole run; the module saves it in checkpoints."""
        self._of_epoch = 0
        self._reason = ""

    def check(self, losses: Tensor, sigma: Tensor, epoch: int, step: int) -> bool:
        """Whether losses (b,) of a micro-batch at noise levels sigma (b,) are finite. If not, the step has failed."""
        finite = losses.isfinite()
        if finite.all():
            return True
        first = float(sigma[(~finite).nonzero()[0]])
        self._reason = (
            f"the loss of {int((~finite).sum())} of {len(losses)} points is not finite (first: sigma {first:.3f}, "
            f"epoch {epoch}, step {step})"
        )
        return False

    @property
    def failed(self) -> bool:
        """Whether a micro-batch of this step had a non-finite loss on this rank."""
        return bool(self._reason)

    def count_of_epoch(self) -> int:
        """The steps skipped since the last call."""
        count, self._of_epoch = self._of_epoch, 0
        return count

    def skip_step(self) -> None:
        """Count a skipped step, on all ranks alike. Raises NotFiniteError beyond the limit."""
        reason, self._reason = self._reason or "the gradient, or a loss of another rank, is not finite", ""
        self.skipped += 1
        self._of_epoch += 1
        if self.skipped > self.limit:
            raise NotFiniteError(
                f"{reason}, and optimisation.max_skipped={self.limit} allows no further skipped step; a lower learning "
                "rate or fp32 helps, and algo.adv_clip bounds the credit."
            )
        log.warning("%s: the step is skipped (%d of at most %d)", reason, self.skipped, self.limit)


def checked_loss(
    algorithm: Algorithm, point: Point, v: Tensor, copies: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (B,) and metrics (B,) of an algorithm. Raises ConfigError for mistakes of a user-defined algorithm.

    copies: names of all possible frozen copies.
    """
    name = type(algorithm).__name__
    try:
        losses, metrics = algorithm.loss(point, v)
    except KeyError as error:
        if not error.args or error.args[0] not in {*copies, "reference"} - point.frozen.keys():
            raise
        raise ConfigError(
            f"{name}.loss asks for point.frozen[{error}], which is there for the copies that the algorithm names in "
            "`consults`."
        ) from error
    for what, value in {"loss": losses, **metrics}.items():
        if value.shape != v.shape[:1]:
            raise ConfigError(
                f"{name}.loss returned {what} of shape {tuple(value.shape)} for {len(v)} points: loss and metrics have "
                "one value a point, (B,), of which the run takes the mean."
            )
    return losses, metrics


def check_ratio(ratio: Tensor, tolerance: float | None, precision: str) -> float:
    """Largest |ratio − 1| before the first update. Raises RuntimeError if it exceeds the tolerance.

    ratio: (b,). tolerance: None is 1e-5 in float32, 1e-4 on a GPU with TF32 matmuls, and 1e-3 in 16 bits.
    """
    gap = float((ratio - 1).abs().max())
    if tolerance is None:
        tf32 = ratio.is_cuda and torch.get_float32_matmul_precision() != "highest"
        tolerance = (1e-4 if tf32 else 1e-5) if precision.startswith("32") else 1e-3
    if gap > tolerance:
        raise RuntimeError(
            f"before the first update the importance ratio must be 1, but it is off by {gap:.2e}: rollout and training "
            "disagree (guidance, precision, dropout or resolution). optimisation.on_policy_tolerance sets the limit."
        )
    return gap
