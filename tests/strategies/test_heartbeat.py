"""Two ranks as two threads of this process: what they learn of each other."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from flowalign.strategies.heartbeat import Heartbeat
from tests.conftest import ROOT

BUSY = """
import time
from flowalign.strategies.heartbeat import Heartbeat
for _ in range(8):
    Heartbeat(0, 2, limit=30.0, find_failure=lambda: "", period=0.0).connect("127.0.0.1", lambda port: port)
time.sleep(0.3)
"""
"""A process that ends while its heartbeats are, most of the time, inside of their stores."""


class Rank(Heartbeat):
    """Says why it would have ended the process, and can fall silent."""

    def __init__(self, rank: int, ended: str = "") -> None:
        super().__init__(rank, 2, limit=1.0, find_failure=lambda: ended, period=0.05)
        self.reason, self.told, self.silent = "", threading.Event(), False

    def _set(self, key: str, value: str) -> None:
        if not self.silent:
            super()._set(key, value)

    def _end(self, reason: str) -> None:
        if not self.told.is_set():
            self.reason = reason
            self.told.set()
        self.watching = False


def pair(ended: str = "") -> tuple[Rank, Rank]:
    ranks, port = (Rank(0, ended), Rank(1)), [0]

    def say(mine: int) -> int:
        port[0] = mine or port[0]
        return port[0]

    for rank in ranks:
        rank.connect("127.0.0.1", say)
    return ranks


@pytest.fixture
def ranks() -> Iterator[tuple[Rank, Rank]]:
    both = pair()
    for rank in both:
        rank.watch(True)
    yield both
    for rank in both:
        rank.watch(False)


def test_ranks_that_live_are_left_alone(ranks: tuple[Rank, Rank]):
    time.sleep(2)
    assert not any(rank.told.is_set() for rank in ranks)


def test_a_silent_rank_counts_as_dead_and_is_named(ranks: tuple[Rank, Rank]):
    ranks[1].silent = True
    assert ranks[0].told.wait(30)
    assert ranks[0].reason == "rank 1 has died, or has not been heard of for 1 s"


def test_a_rank_that_fails_tells_the_others_why(ranks: tuple[Rank, Rank]):
    ranks[1].report_failure("RewardError: no server")
    assert ranks[0].told.wait(30)
    assert ranks[0].reason.startswith("rank 1 (")
    assert ranks[0].reason.endswith(" failed: RewardError: no server")


def test_what_the_launcher_knows_reaches_every_rank():
    both = pair("rank 1 (process 7) ended with signal 9")
    for rank in both:
        rank.watch(True)
    for rank in both:
        assert rank.told.wait(30)
        assert rank.reason == "rank 1 (process 7) ended with signal 9"


def test_between_stages_nobody_is_missed(ranks: tuple[Rank, Rank]):
    for rank in ranks:
        rank.watch(False)
    ranks[1].silent = True
    time.sleep(2)
    assert not ranks[0].told.is_set()


def test_a_process_that_is_done_is_not_aborted_by_its_heartbeat():
    """Python ends threads by unwinding them, which the store does not survive: a run that had finished had failed."""
    ended = subprocess.run([sys.executable, "-c", BUSY], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-1000:]
