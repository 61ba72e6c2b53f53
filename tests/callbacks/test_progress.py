"""The lines that a run prints."""

from __future__ import annotations

from typing import Any

from flowalign.callbacks.progress import PhaseProgress


class Elsewhere:
    """A Trainer on a rank that prints nothing."""

    is_global_zero = False
    reads = 0

    @property
    def callback_metrics(self) -> dict[str, Any]:
        self.reads += 1
        return {}


def test_all_ranks_read_the_metrics_for_the_line_of_the_first():
    """Lightning averages them over the ranks when they are read: alone, the first rank would wait for ever."""
    trainer: Any = Elsewhere()
    PhaseProgress().on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert trainer.reads == 1
