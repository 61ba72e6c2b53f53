"""What is no checkpoint is refused in a sentence, and nothing in it runs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bench.faults import Bomb, spoilt
from flowalign.callbacks.checkpoint_io import AtomicCheckpointIO
from flowalign.checks import ConfigError
from flowalign.strategies import folders
from flowalign.strategies.intact import check_intact

WHOLE = {"state_dict": {"w": torch.ones(4000)}, "optimizer_states": [], "loops": {}, "flowalign": {}, "epoch": 1}
SAYS = {
    "empty": "is empty",
    "truncated": "is cut short, or no checkpoint",
    "foreign": "no checkpoint at all",
    "one bit upset": "is damaged",
    "code in it, zipped": "may be code: it is not opened",
    "code in it, a plain pickle": "no checkpoint at all",
    "of another program": "was not written by a run of flowalign: it has no optimizer_states",
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(WHOLE, tmp_path / "whole" / "checkpoints" / "last.ckpt")
    return tmp_path / "whole"


def test_every_kind_of_rubbish_is_refused_and_none_is_executed(whole: Path, tmp_path: Path):
    check_intact(whole / "checkpoints" / "last.ckpt")
    told = {}
    for name, path in spoilt(whole, tmp_path / "spoilt"):
        with pytest.raises(ConfigError, match="^ckpt_path=") as refusal:
            check_intact(path)
        told[name] = str(refusal.value)
        assert "\n" not in told[name]
    assert told.keys() == SAYS.keys()
    assert not [name for name, words in SAYS.items() if words not in told[name]], told
    assert not (tmp_path / "spoilt" / "executed").exists()


def folder_of(path: Path, state: dict[str, Any]) -> Path:
    """As a sharded run writes it, by one process."""
    frame, tensors = folders.split(state)
    dcp.save({"/".join(map(str, place)): t for place, t in tensors.items()}, checkpoint_id=path, no_dist=True)
    torch.save(frame, path / folders.META)
    return path


def test_a_folder_that_is_whole_passes(tmp_path: Path):
    check_intact(folder_of(tmp_path / "last.ckpt", WHOLE))


def test_a_folder_with_a_part_cut_short_is_refused(tmp_path: Path):
    path = folder_of(tmp_path / "last.ckpt", WHOLE)
    part = next(path.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"is damaged: __0_0\.distcp is cut short"):
        check_intact(path)


def test_a_folder_whose_index_is_code_is_refused_before_torch_reads_it(tmp_path: Path):
    path = folder_of(tmp_path / "last.ckpt", WHOLE)
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(ConfigError, match=r"may be code: it is not opened"):
        check_intact(path)
    assert not (tmp_path / "executed").exists()
