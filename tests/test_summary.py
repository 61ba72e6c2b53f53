"""What a run says at its end."""

from __future__ import annotations

import io
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.types import RunMode
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from flowalign.summary import Summary, _best
from flowalign.sweeps import record_failures


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
        (
            2,
            -1,
            ["+reward.weights.a=1", "+reward.weights.b=1", "reward.weights.a=2"],
            "+reward.weights.b=1 +reward.weights.a=2 {again} trainer.max_epochs=4",
        ),
        (2, -1, ["++algo.kl_beta=1", "algo.kl_beta=2"], "++algo.kl_beta=2 {again} trainer.max_epochs=4"),
        (50, 20, ["+trainer.max_steps=20", "ckpt_path=auto"], "{again} trainer.max_epochs=100 trainer.max_steps=40"),
    ],
)
def test_the_command_to_go_on_with_ends_later_than_the_run(epochs: int, steps: int, given: list[str], said: str):
    trainer: Any = SimpleNamespace(max_epochs=epochs, max_steps=steps)
    summary = Summary(Path(), 0, SimpleNamespace(), given)  # type: ignore[arg-type]
    assert summary._resume_command(Path("last.ckpt"), trainer) == "python train.py " + said.format(
        again="ckpt_path=last.ckpt"
    )


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("train.py", "python train.py"),
        ("/some where/train.py", "python '/some where/train.py'"),
        ("/bin/flowalign-train", "flowalign-train"),
    ],
)
def test_the_command_to_go_on_with_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch, script: str, program: str):
    """It works from where the run was started, which need not be the checkout."""
    monkeypatch.setattr("sys.argv", [script])
    trainer: Any = SimpleNamespace(max_epochs=2, max_steps=-1)
    summary = Summary(Path(), 0, SimpleNamespace(), [])  # type: ignore[arg-type]
    assert summary._resume_command(Path("last.ckpt"), trainer).startswith(f"{program} ckpt_path=last.ckpt ")


@pytest.mark.parametrize(("trained", "counted"), [((0, 0), (2, 8)), ((3, 12), (3, 12))])
def test_an_evaluation_alone_counts_what_its_checkpoint_was_trained(trained: tuple[int, int], counted: tuple[int, int]):
    trainer: Any = SimpleNamespace(current_epoch=trained[0], global_step=trained[1])
    module: Any = SimpleNamespace(done=(2, 8))
    assert Summary(Path(), 0, module, [])._done(trainer) == counted


def test_the_best_checkpoint_of_another_folder_is_named_with_its_value(tmp_path: Path):
    """That of a run which is resumed or only evaluated elsewhere: Lightning restores its path, and not its score."""
    here, there = (ModelCheckpoint(tmp_path / name, monitor="val/reward") for name in ("here", "there"))
    there.best_model_path, there.best_model_score = str(tmp_path / "best.ckpt"), torch.tensor(0.625)
    state = {"epoch": 3, "callbacks": {there.state_key: there.state_dict()}}
    torch.save(state, tmp_path / "best.ckpt")
    with pytest.warns(UserWarning, match="dirpath has changed"):
        here.load_state_dict(state["callbacks"][here.state_key])
    said = _best(SimpleNamespace(checkpoint_callbacks=[here]))  # type: ignore[arg-type]
    assert said == [f"flowalign evaluate ckpt={tmp_path}/best.ckpt  # val/reward 0.625 after epoch 4"]


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_the_trace_of_an_error_is_in_the_log_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: RunMode):
    """Of a run alone the terminal has it from Python, which ends with it; a sweep goes on."""
    file, terminal = logging.FileHandler(tmp_path / "run.log"), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [file, terminal])
    node = SimpleNamespace(mode=mode, runtime=SimpleNamespace(output_dir=str(tmp_path)))
    monkeypatch.setattr("flowalign.sweeps.HydraConfig", SimpleNamespace(get=lambda: node))
    monkeypatch.setattr("flowalign.sweeps._record", lambda error, refused: None)

    @record_failures
    def run(cfg: Any) -> float | None:
        raise KeyError("velocity")

    with pytest.raises(KeyError) if mode == RunMode.RUN else nullcontext():
        run(DictConfig({}))
    file.close()
    assert (tmp_path / "run.log").read_text().count("KeyError: 'velocity'") == 1
    assert terminal.stream.getvalue().count("KeyError: 'velocity'") == (mode == RunMode.MULTIRUN)
