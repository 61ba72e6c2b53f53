"""Rewards in processes: the same scores, and a way out of everything that may happen to a process."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.rewards.base import RewardError
from flowalign.rewards.jpeg import Jpeg
from flowalign.rewards.workers import InWorkers, Worker, WorkerDiedError
from tests.conftest import ROOT
from tests.rewards.toys import Compared, Light, process

MEDIA = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NOTHING: list[dict[str, Any]] = [{}] * 5


@pytest.fixture
def workers() -> Iterator[Callable[..., InWorkers]]:
    made: list[InWorkers] = []

    def make(reward: Any, **settings: Any) -> InWorkers:
        made.append(InWorkers(reward, **{"workers": 1, "chunk": 1, "timeout": 120.0} | settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def scores(reward: InWorkers, *prompts: str) -> Tensor:
    return reward(MEDIA[: len(prompts)], list(prompts), NOTHING[: len(prompts)])


def alive(number: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(numbers: list[int], seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, numbers)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, numbers))


def test_scores_are_those_of_this_process_to_the_last_bit(workers: Callable[..., InWorkers]):
    metadata = [{"plus": i} for i in range(5)]
    for reward, built in ((partial(Light, folder=""), Light()), (Jpeg(), Jpeg())):
        beside = workers(reward, workers=2, chunk=2)
        beside.self_check()
        assert torch.equal(beside(MEDIA, ["a"] * 5, metadata), built(MEDIA, ["a"] * 5, metadata))


def test_a_killed_process_costs_nothing_if_its_samples_can_be_scored_again(
    workers: Callable[..., InWorkers], tmp_path: Path, caplog: Any
):
    reward = workers(Light(str(tmp_path)))
    assert torch.equal(scores(reward, "a", "crash once", "b"), MEDIA[:3].flatten(1).mean(1))
    assert "a worker that scored 1 samples died (killed, often for lack of memory): they are sc" in caplog.text


def test_samples_that_kill_twice_have_no_score_and_the_others_do(workers: Callable[..., InWorkers], caplog: Any):
    reward = workers(Light())
    assert scores(reward, "a", "crash", "b").isnan().tolist() == [False, True, False]
    assert [line.split(": ")[-1] for line in caplog.messages] == ["they are scored again.", "they have no score."]


def test_a_reward_that_never_returns_is_ended(workers: Callable[..., InWorkers], caplog: Any):
    reward = workers(Light())
    reward._workers[0].timeout = 1.0
    assert scores(reward, "hang").isnan().all()
    assert "took more than 1 s" in caplog.text
    reward._workers[0].timeout = 120.0
    assert not scores(reward, "a").isnan().any()


def test_what_a_reward_raises_is_raised_here_with_its_trace(workers: Callable[..., InWorkers]):
    reward = workers(Light())
    with pytest.raises(RewardError, match=r"^no metadata\.$"):
        scores(reward, "refuse")
    with pytest.raises(KeyError) as raised:
        scores(reward, "raise")
    assert "in _do" in "".join(raised.value.__notes__)
    number = reward._workers[0].process.pid
    assert not scores(reward, "a").isnan().any()
    assert reward._workers[0].process.pid == number  # the same process


def test_a_failing_check_says_its_reason(workers: Callable[..., InWorkers]):
    with pytest.raises(RewardError, match="it is broken"):
        workers(partial(Light, folder="broken")).self_check()


def test_plain_functions_and_whole_groups(workers: Callable[..., InWorkers]):
    seen = set(scores(workers(process, workers=2), *"abcde").tolist())
    assert float(os.getpid()) not in seen
    assert 1 <= len(seen) <= 2
    reward = workers(Compared(), workers=2)
    assert reward.groupwise
    groups = torch.tensor([3, 3, 3, 4, 4])
    assert reward(MEDIA, ["a"] * 5, NOTHING, groups=groups).tolist() == [3, 3, 3, 2, 2]


def test_impossible_settings_are_refused():
    for settings, sentence in (
        ({"workers": 0}, "workers must be positive"),
        ({"reward": lambda *a: None}, "cannot be sent to a process .* define it in a module"),
    ):
        with pytest.raises(ValueError, match=sentence):
            InWorkers(**{"reward": Light()} | settings)


def test_closing_ends_the_processes(workers: Callable[..., InWorkers]):
    reward = workers(process)
    number = int(scores(reward, "a")[0])
    assert alive(number)
    reward.close()
    assert gone([number])
    with pytest.raises(RuntimeError, match="shutdown"):
        scores(reward, "a")


def test_a_process_that_is_being_started_does_not_outlive_the_end(monkeypatch: pytest.MonkeyPatch):
    """As with Ctrl-C, when one thread ends the worker while another one is about to ask it."""
    begun, go_on, killed = threading.Event(), threading.Event(), threading.Event()
    worker = Worker(pickle.dumps(Light()), timeout=60, threads=1)
    start = worker._start

    def slow_start() -> Any:
        process, pipe = start()
        begun.set()
        assert go_on.wait(60)
        return process, pipe

    monkeypatch.setattr(worker, "_start", slow_start)
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(worker.ask, "self_check", ())
        assert begun.wait(60)
        ended = threads.submit(lambda: (worker.end(forever=True), killed.set()))
        assert not killed.wait(0.2)  # it waits for the process
        go_on.set()
        ended.result(60)
        assert isinstance(asked.exception(60), WorkerDiedError | None)
    assert gone([worker.process.pid])
    with pytest.raises(WorkerDiedError, match="has been closed"):
        worker.ask("self_check", ())


PARENT = """
import signal
from tests.rewards.test_workers import InWorkers, Light, process, scores
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would pass on its deafness
    resting, hanging = InWorkers(process, workers=1), InWorkers(Light(), workers=1)
    print(int(scores(resting, "a")[0]), flush=True)
    scores(hanging, "a")
    print(hanging._workers[0].process.pid, flush=True)
    scores(hanging, "hang")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path: Path, how: signal.Signals):
    """One rests and one is in the middle of something when the parent goes, or Ctrl-C reaches them all."""
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    numbers = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(alive, numbers))
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
    else:
        parent.send_signal(how)
    assert gone([*numbers, parent.pid])
    parent.wait()
