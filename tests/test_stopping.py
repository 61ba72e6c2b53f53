"""Signals, in this process: what is noticed, when it is obeyed, and that nothing is lost by it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from flowalign.callbacks.preemption import Preemption
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.stopping import Requests, Stopped, slurm_job, stop_requests, wind_down

if TYPE_CHECKING:
    from omegaconf import DictConfig


def test_a_signal_outside_of_a_stage_ends_the_process_at_once():
    requests = Requests()
    before = signal.getsignal(signal.SIGTERM)
    with requests.listening(), pytest.raises(Stopped) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_inside_of_a_stage_is_noted_and_ctrl_c_is_obeyed():
    requests = Requests()
    with requests.listening():
        requests.set_polled(True)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (requests.number, requests.times) == (signal.SIGUSR1, 2)
        with pytest.raises(Stopped, match="130"):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_taken_back_from_lightning():
    requests = Requests()
    with requests.listening():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        requests.set_polled(True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.number == signal.SIGTERM
    requests.set_polled(True)  # nobody listens: handlers are none of its business
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_another_thread_leaves_signals_as_they_are():
    seen: list[Any] = []

    def listen() -> None:
        with Requests().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(
    ("rank", "slurm", "code"),
    [("0", None, 143), ("1", None, 0), ("1", "0", 0), ("1", "1", 143)],  # the last one is a task of srun
)
def test_the_launchers_own_processes_end_with_zero(
    monkeypatch: pytest.MonkeyPatch, rank: str, slurm: str | None, code: int
):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if slurm is not None:
        monkeypatch.setenv("SLURM_LOCALID", slurm)
    assert Stopped(signal.SIGTERM).code == code


def test_a_job_of_an_array_is_named_by_its_place():
    """The number of its last job is that of the array: all of them would be started again."""
    assert slurm_job({}) is None
    assert slurm_job({"SLURM_JOB_ID": "7"}) == "7"
    assert slurm_job({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}) == "7_3"


@pytest.fixture
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
@pytest.mark.parametrize(
    ("number", "requeue", "rank", "done"),
    [
        (signal.SIGUSR1, True, 0, True),
        (signal.SIGUSR1, False, 0, False),
        (signal.SIGTERM, True, 0, False),
        (signal.SIGUSR1, True, 1, False),  # of torchrun in the first task, say, where SLURM_PROCID is 0
    ],
)
def test_a_slurm_job_goes_back_into_its_queue_once_if_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, requeue: bool, rank: int, done: bool
):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setenv("SLURM_PROCID", "0")
    command = tmp_path / "scontrol"
    command.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)  # this process goes on
    wind_down(Stopped(number), tmp_path, None, requeue)
    assert (tmp_path / "asked").exists() == done
    if done:
        assert (tmp_path / "asked").read_text() == "requeue 17\n"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # SLURM's answer does not cut the end short


@pytest.mark.parametrize(
    ("given", "written", "hint"),
    [
        (None, False, "nothing was saved yet"),
        ("auto", False, "nothing was saved yet"),
        ("elsewhere.ckpt", False, "go on with ckpt_path=elsewhere.ckpt"),
        ("auto", True, "go on with ckpt_path=…/checkpoints/last.ckpt"),
    ],
)
def test_a_stopped_run_says_what_there_is_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    given: str | None, written: bool, hint: str,
):  # fmt: skip
    monkeypatch.setattr(threading.Timer, "start", lambda self: None)  # this process goes on
    if written:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").touch()
    wind_down(Stopped(signal.SIGTERM), tmp_path, given, requeue=False)
    assert caplog.messages[-1].replace(str(tmp_path), "…") == f"stopped by SIGTERM: {hint}"


# ------------------------------------------------------------ in a training


@pytest.fixture
def fit(tiny: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., Any]:
    """Trains two epochs with a Trap that sends this process a signal in the second one."""

    def train(folder: str, *words: str, moment: str = "", resume: Path | None = None) -> Any:
        from bench.trap import Trap
        from flowalign.module import AlignModule

        cfg = tiny(
            "callbacks=[checkpoint,preemption]", f"paths.output_dir={tmp_path / folder}", "trainer.max_epochs=3",
            "trainer.check_val_every_n_epoch=3", "rollout.batch_size=2", "rollout.num_steps=2", "batch.micro=2",
            "reward=brightness", "~reward.held_out", "evaluation.num_val=2", "evaluation.sampling.num_steps=1", *words,
        )  # fmt: skip
        (tmp_path / folder).mkdir(exist_ok=True)
        recipe = build_recipe(cfg)
        module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
        trainer.callbacks.append(Trap(str(tmp_path / folder), moment))  # type: ignore[attr-defined]
        with stop_requests.listening():
            trainer.fit(module, ckpt_path=resume)
        return module

    return train


@pytest.mark.parametrize(("ranks", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (2, [3, 6, 8])])
def test_ranks_ask_each_other_once_a_step(monkeypatch: pytest.MonkeyPatch, ranks: int, expected: list[int]):
    """Of three micro-batches; the last step of a limited epoch has two."""
    looked: list[int] = []
    trainer: Any = SimpleNamespace(world_size=ranks, accumulate_grad_batches=3, num_training_batches=8)
    monkeypatch.setattr(Preemption, "_check", lambda self, trainer, left: looked.append(batch + 1))
    callback, nobody = Preemption(), cast(Any, None)
    for batch in range(8):
        callback.on_train_batch_start(trainer, nobody, None, batch)
        callback.on_train_batch_end(trainer, nobody, None, None, batch)
    assert looked == expected


@pytest.mark.parametrize(
    ("moment", "words", "epochs"),
    [
        ("rollout", (), 1),
        pytest.param("optimisation", ("callbacks.preemption.grace=600",), 2, marks=pytest.mark.slow),
        pytest.param("optimisation", ("callbacks.preemption.grace=0",), 1, marks=pytest.mark.slow),
        pytest.param("writing", (), 2, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    fit: Callable[..., Any], tmp_path: Path, moment: str, words: tuple[str, ...], epochs: int
):
    with pytest.raises(Stopped):
        fit("stopped", *words, moment=moment)
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] + 1 == epochs
    resumed, straight = fit("stopped", resume=last), fit("straight")
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in straight.state_dict().items())
