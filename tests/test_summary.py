"""What a run says at its end."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flowalign.run import keep_trace
from flowalign.summary import Summary


@pytest.mark.parametrize(
    ("epochs", "steps", "given", "said"),
    [
        (2, -1, ["seed=1", "trainer.max_epochs=2"], "seed=1 {again} trainer.max_epochs=4"),
        (
            -1,
            20,
            ["trainer.max_steps=20", "trainer.max_epochs=-1"],
            "trainer.max_epochs=-1 {again} trainer.max_steps=40",
        ),
        (2, -1, ["seed=1", "algo=nft", "seed=2"], "algo=nft seed=2 {again} trainer.max_epochs=4"),
        (50, 20, ["+trainer.max_steps=20", "ckpt_path=auto"], "{again} trainer.max_epochs=100 trainer.max_steps=40"),
    ],
)
def test_the_command_to_go_on_with_ends_later_than_the_run(epochs: int, steps: int, given: list[str], said: str):
    trainer: Any = SimpleNamespace(max_epochs=epochs, max_steps=steps)
    summary = Summary(Path(), 0, SimpleNamespace(), given)  # type: ignore[arg-type]
    assert summary._again(Path("last.ckpt"), trainer) == "python train.py " + said.format(again="ckpt_path=last.ckpt")


def test_the_trace_of_an_error_is_in_the_log_file_and_not_twice_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file, terminal = logging.FileHandler(tmp_path / "run.log"), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [file, terminal])
    try:
        raise KeyError("velocity")
    except KeyError:
        keep_trace()
    file.close()
    assert "KeyError: 'velocity'" in (tmp_path / "run.log").read_text()
    assert terminal.stream.getvalue() == ""
