"""A folder is whole or absent, and one process reads what several wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flowalign import resuming
from flowalign.callbacks.checkpoint_io import AtomicCheckpointIO
from flowalign.files import remove_partials
from flowalign.lock import locked
from flowalign.resuming import find_checkpoint, last_checkpoint
from flowalign.strategies import folders
from flowalign.tensors import join_tensors, split_tensors


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoint(epoch: int) -> dict[str, Any]:
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.full((2, 3), float(epoch))}, 1: {}}
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]
    return {
        "epoch": epoch,
        "state_dict": {"policy.w": torch.arange(6.0).reshape(2, 3) + epoch, "policy.b": torch.ones(1)},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
        "callbacks": {"best": torch.tensor([0.5])},
    }


def same(one: Any, other: Any) -> bool:
    frames, tensors = zip(*(split_tensors(nest) for nest in (one, other)), strict=True)
    equal = all(torch.equal(t, tensors[1][place]) for place, t in tensors[0].items())
    return equal and tensors[0].keys() == tensors[1].keys() and str(frames[0]) == str(frames[1])


def test_a_nest_comes_apart_and_together_again():
    frame, tensors = split_tensors(checkpoint(1))
    assert ("optimizer_states", 0, "state", 0, "exp_avg") in tensors
    assert all(t.is_meta for t in split_tensors(frame)[1].values())
    assert same(join_tensors(frame, tensors), checkpoint(1))
    assert isinstance(frame["optimizer_states"][0]["param_groups"][0]["betas"], tuple)


@pytest.mark.usefixtures("alone")
def test_one_process_reads_a_folder_as_it_would_a_file(tmp_path: Path):
    folders.write(checkpoint(1), tmp_path / "last.ckpt", first=True)
    assert folders.is_folder(tmp_path / "last.ckpt")
    assert same(folders.read(tmp_path / "last.ckpt"), checkpoint(1))
    assert same(AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt"), checkpoint(1))
    folders.write(checkpoint(2), tmp_path / "last.ckpt", first=True)
    assert same(folders.read(tmp_path / "last.ckpt"), checkpoint(2))
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "store"]


@pytest.mark.usefixtures("alone")
def test_a_folder_takes_the_place_of_a_file(tmp_path: Path):
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    folders.write(checkpoint(2), tmp_path / "last.ckpt", first=True)
    assert folders.read(tmp_path / "last.ckpt")["epoch"] == 2
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "store"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_file_takes_the_place_of_a_folder_and_a_kill_meanwhile_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
):
    target, rename, calls = tmp_path / "last.ckpt", os.rename, []

    def interrupted(*names: Any) -> None:
        calls.append(names)
        if len(calls) == moment:
            raise KeyboardInterrupt
        rename(*names)

    folders.write(checkpoint(1), target, first=True)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt) if moment else nullcontext():
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), target)
    monkeypatch.undo()
    assert find_checkpoint(str(target)) == str(target)
    assert same(folders.read(target), checkpoint(1 if moment else 2))
    remove_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "store"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_while_the_folder_takes_its_place_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
):
    target, rename, calls = tmp_path / "last.ckpt", os.rename, []

    def interrupted(*names: Any) -> None:
        calls.extend(name for name in names[:1] if Path(name).is_dir())  # torch renames files of its own
        if len(calls) == moment and Path(names[0]).is_dir():
            raise KeyboardInterrupt
        rename(*names)

    folders.write(checkpoint(1), target, first=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folders.write(checkpoint(2), target, first=True)
    assert target.exists() == (moment == 1)  # at the second moment the name is free
    assert find_checkpoint(str(target)) == str(target)
    assert same(folders.read(target), checkpoint(1))
    remove_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "store"]


def test_what_waits_in_the_folder_of_a_run_that_is_going_is_its_own(tmp_path: Path):
    """It is about to put the new one into its place."""
    waiting = tmp_path / "checkpoints" / ".last.ckpt.old"
    waiting.parent.mkdir()
    waiting.touch()
    with locked(tmp_path):
        assert last_checkpoint(tmp_path) is None
        assert waiting.exists()
    assert last_checkpoint(tmp_path) == str(waiting.with_name("last.ckpt"))


@pytest.mark.parametrize("given", ["", "checkpoints/last.ckpt"])
def test_the_folder_of_the_run_itself_is_not_locked_for_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
):
    """Every rank looks, and rank 0, which locks it for the run, would be refused if another one was quicker."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    with locked(tmp_path):
        pass
    taken: list[Path] = []
    monkeypatch.setattr(resuming, "locked", lambda folder: taken.append(folder) or nullcontext())
    assert find_checkpoint(str(tmp_path / given), tmp_path) == str(last)
    assert tmp_path not in taken
    assert find_checkpoint(str(tmp_path / given), tmp_path / "other") == str(last)
    assert tmp_path in taken


def test_files_of_others_that_are_called_old_are_left_alone(tmp_path: Path):
    """Somebody's home may be where a checkpoint is looked for."""
    for name in (".notes.txt.old", "notes.txt", ".profile.old"):
        (tmp_path / name).write_text(name)
    with pytest.raises(ValueError, match="does not exist"):
        find_checkpoint(str(tmp_path / "mistyped.ckpt"))
    assert sorted(os.listdir(tmp_path)) == [".notes.txt.old", ".profile.old", "notes.txt"]


@pytest.mark.usefixtures("alone")
def test_a_folder_without_its_last_file_is_no_checkpoint(tmp_path: Path):
    target = tmp_path / "last.ckpt"
    folders.write(checkpoint(1), target, first=True)
    (target / folders.META).unlink()
    assert not folders.is_folder(target)
    with pytest.raises(ValueError, match=r"last.ckpt holds no checkpoint\.$"):
        find_checkpoint(str(target))
