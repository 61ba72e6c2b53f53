"""When ranks ask each other whether one of them was told to stop."""

from types import SimpleNamespace
from typing import Any

import pytest

from flowalign.callbacks.preemption import Preemption


def test_ranks_ask_each_other_once_an_optimiser_step(monkeypatch: pytest.MonkeyPatch):
    """Between the micro-batches of a step none waits for another; the last batch of an epoch ends a step too."""
    callback, looked = Preemption(), []
    trainer: Any = SimpleNamespace(accumulate_grad_batches=4, num_training_batches=10)
    monkeypatch.setattr(callback, "_look", lambda trainer, left: looked.append(batch))
    for batch in range(10):
        callback.on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert looked == [3, 7, 9]
