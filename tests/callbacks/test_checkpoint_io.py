import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.callbacks.checkpoint_io import AtomicCheckpointIO
from flowalign.checks.errors import RunError
from flowalign.files import remove_partials

OLD, NEW = {"epoch": 1, "w": torch.ones(3)}, {"epoch": 2, "w": torch.zeros(3)}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(OLD, path)
    return path


def epoch(path: Path) -> int:
    return AtomicCheckpointIO().load_checkpoint(path)["epoch"]


def test_a_checkpoint_comes_back_and_replaces_the_previous_one(target: Path):
    assert epoch(target) == 1
    AtomicCheckpointIO().save_checkpoint(NEW, f"file://{target}")
    assert epoch(target) == 2
    assert os.listdir(target.parent) == ["last.ckpt"]


def test_a_checkpoint_is_as_readable_for_others_as_any_file(target: Path):
    ordinary = target.with_name("ordinary")
    ordinary.touch()
    assert target.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(28, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_while_writing_keeps_the_old_file_and_leaves_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, told: type[BaseException]
):
    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(told, match=r"^$|last\.ckpt could not be written \(No space left on device\)"):
        AtomicCheckpointIO().save_checkpoint(NEW, target)
    assert epoch(target) == 1
    assert os.listdir(target.parent) == ["last.ckpt"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_is_told_and_keeps_the_old_file(tmp_path: Path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        AtomicCheckpointIO().save_checkpoint(OLD, tmp_path / "last.ckpt")
        with pytest.raises(RunError, match="No space left"):
            AtomicCheckpointIO().save_checkpoint({"w": torch.ones(400_000)}, tmp_path / "last.ckpt")
        assert epoch(tmp_path / "last.ckpt") == 1
        assert os.listdir(tmp_path) == ["last.ckpt"]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_an_object_that_cannot_be_pickled_keeps_the_old_file(target: Path):
    with pytest.raises(Exception, match="pickle|lambda"):
        AtomicCheckpointIO().save_checkpoint({"f": lambda: None}, target)
    assert epoch(target) == 1
    assert os.listdir(target.parent) == ["last.ckpt"]


def test_the_disk_is_asked_to_keep_the_file_before_it_gets_its_name(target: Path, monkeypatch: pytest.MonkeyPatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    AtomicCheckpointIO().save_checkpoint(NEW, target)
    assert order == ["sync", "replace", "sync"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_the_old_file_and_a_leftover_that_sweep_removes(target: Path):
    child = os.fork()  # a fresh interpreter would spend seconds on imports
    if child == 0:

        def die(checkpoint: Any, file: Any) -> None:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = die
        AtomicCheckpointIO().save_checkpoint(NEW, target)
        os._exit(1)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert epoch(target) == 1
    assert len(os.listdir(target.parent)) == 2
    assert len(remove_partials(target.parent)) == 1
    assert os.listdir(target.parent) == ["last.ckpt"]


def test_sweep_touches_nothing_else(target: Path):
    target.with_name(".hidden").touch()
    target.with_name("mine.partial").touch()
    assert remove_partials(target.parent) == []
    assert remove_partials(target.parent / "absent") == []
    assert len(os.listdir(target.parent)) == 3
