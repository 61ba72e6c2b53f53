"""Nothing that comes from elsewhere is executed: not a checkpoint, not a cache, not a reward."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.embeddings import Embeddings
from flowalign.rewards.base import RewardError
from flowalign.rewards.latent.files import FACTS, WEIGHTS, load
from flowalign.rewards.weights import load_tensors
from flowalign.strategies import folders
from flowalign.types import Conditioning

ROOT = Path(__file__).parents[1]
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*(ROOT / "flowalign").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), ROOT / "train.py"]
}
PICKLES = {"flowalign/rewards/workers.py", "flowalign/strategies/intact.py", "bench/faults.py"}
"""Processes of our own exchange a reward and its errors; an index is read with nothing but plain values allowed; and
the faults are made with one."""
EVALUATES = {"flowalign/checks/signatures.py"}
"""The annotations of imported classes, as typing.get_type_hints does."""


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def test_the_trap_works(mark: Path):
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()


def using(pattern: str) -> set[str]:
    return {name for name, source in SOURCES.items() if re.search(pattern, source)}


def test_tensors_are_read_as_weights_only():
    calls = [call for source in SOURCES.values() for call in re.findall(r"torch\.load\((.*)", source)]
    assert len(calls) >= 5
    assert [call for call in calls if "weights_only=True" not in call] == []
    assert using(r"allow_pickle\s*=\s*True|weights_only\s*=\s*False") == set()


def test_nothing_else_executes_what_it_reads():
    assert using(r"\bimport (pickle|marshal|shelve|dill|cloudpickle)\b|from (pickle|marshal|dill) ") == PICKLES
    assert using(r"\byaml\.(load|unsafe_load|full_load)\(") == set()
    assert using(r"(?<![.\w])(eval|exec)\(") == EVALUATES
    assert using(r"shell\s*=\s*True|os\.system\(") == set()
    assert using(r"trust_remote_code\s*=\s*True") == set()
    configs = [path.read_text() for path in (ROOT / "conf").rglob("*.yaml")]
    assert not any("trust_remote_code: true" in text for text in configs)


def test_a_checkpoint_with_code_in_it_is_refused_unexecuted(mark: Path, tmp_path: Path):
    from flowalign.callbacks.checkpoint_io import AtomicCheckpointIO
    from flowalign.commands.saved import load_run

    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "flowalign": Trap(mark)}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_run(str(path), "live")
    for read in (
        folders.read,
        folders.read_split,
        lambda p: AtomicCheckpointIO().load_checkpoint(p, weights_only=True),
    ):
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
            read(path)
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    torch.save({"flowalign": Trap(mark)}, folder / folders.META)
    with pytest.raises(pickle.UnpicklingError):
        folders.read(folder)
    assert not mark.exists()


def test_a_run_resumes_with_weights_only(monkeypatch: pytest.MonkeyPatch, mark: Path, tmp_path: Path):
    """Lightning asks the plugin for the file with the setting of `fit`, which is None: torch's own default."""
    from flowalign.callbacks.checkpoint_io import AtomicCheckpointIO

    path = tmp_path / "last.ckpt"
    torch.save({"callbacks": Trap(mark)}, path)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not mark.exists()


def test_a_prompt_cache_with_code_in_it_is_made_again_unexecuted(mark: Path, tmp_path: Path):
    cache = Embeddings(tmp_path / "cache", "encoder")
    row = Conditioning({"tokens": torch.ones(1, 2)})
    cache.write(("a prompt",), row)
    (file,) = cache.folder.rglob("*.safetensors")
    for write in (lambda p: p.write_bytes(pickle.dumps(Trap(mark))), lambda p: torch.save(Trap(mark), p)):
        write(file)
        assert cache.read(("a prompt",)) is None
    assert not mark.exists()


def test_the_weights_of_a_reward_with_code_in_them_are_refused_unexecuted(mark: Path, tmp_path: Path):
    path = tmp_path / "reward.pt"
    torch.save({"weight": torch.ones(1), "more": Trap(mark)}, path)
    with pytest.raises(RewardError, match="cannot be read as weights"):
        load_tensors(path)
    assert not mark.exists()


def test_a_latent_reward_with_code_in_it_is_refused_unexecuted(mark: Path, tmp_path: Path):
    (tmp_path / FACTS).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(RewardError, match="is damaged"):
        load(None, str(tmp_path))  # type: ignore[arg-type]
    assert not mark.exists()


def test_the_reward_server_listens_to_this_machine_alone(monkeypatch: pytest.MonkeyPatch):
    import inspect

    from flowalign.commands.reward_server import LOOPBACK, TOKEN, reward_server

    assert inspect.signature(reward_server).parameters["host"].default in LOOPBACK
    monkeypatch.delenv(TOKEN, raising=False)
    for host in ("0.0.0.0", "::", "10.0.0.1"):
        with pytest.raises(ValueError, match=f"lets other machines in: set {TOKEN}"):
            reward_server("shapes", host=host)
