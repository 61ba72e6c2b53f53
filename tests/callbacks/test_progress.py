"""The line of an epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from flowalign.callbacks.progress import PhaseProgress
from flowalign.module import AlignModule


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


@pytest.mark.parametrize(
    ("share", "shown"), [(0.5, "reward 0.250  ("), (1.0, "reward 0.250  groups of equal rewards 100.0%  (")]
)
def test_an_epoch_in_which_the_rewards_do_not_differ_says_so(
    capsys: pytest.CaptureFixture[str], share: float, shown: str
):
    module = Mock(spec=AlignModule, stats={"reward_mean": 0.25, "zero_std_fraction": share}, evaluated_at=-1)
    trainer: Any = SimpleNamespace(is_global_zero=True, callback_metrics={}, current_epoch=0, max_epochs=3)
    PhaseProgress().on_train_epoch_end(trainer, module)
    assert shown in capsys.readouterr().out
