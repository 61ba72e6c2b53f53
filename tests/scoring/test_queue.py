"""Scoring beside sampling: in order, bounded, and with the same numbers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.base import RewardError
from flowalign.scoring import RewardInput, ScoreQueue, Scorer, Scores


class Gate:
    """A reward that scores when it is let; says who called it."""

    def __init__(self, held: bool = True) -> None:
        self.open, self.threads = threading.Event(), set()
        self.begun: list[str] = []
        if not held:
            self.open.set()

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.begun += prompts
        self.threads.add(threading.current_thread())
        assert self.open.wait(60)
        if "broken" in prompts:
            raise RewardError("it broke.")
        return media.flatten(1).mean(1)


class Part(Gate):
    """One that is made of the policy."""

    def bind(self, model: Any) -> None: ...


def batch(text: str, number: int = 2) -> RewardInput:
    return RewardInput([Prompt(text)] * number, torch.rand(number, 3, 4, 4))


def test_scores_come_in_order_and_only_so_many_batches_wait():
    gate, order = Gate(), []
    scorer = Scorer(gate, ahead=2)
    queue = ScoreQueue(scorer.ahead)
    for name in "ab":
        queue.add(scorer.start(batch(name)), lambda scores, name=name: order.append(name))
    assert order == []  # nothing was waited for
    gate.open.set()
    for name in "cd":
        queue.add(scorer.start(batch(name)), lambda scores, name=name: order.append(name))
    assert order[:2] == ["a", "b"]
    queue.finish()
    assert order == list("abcd")
    assert len(queue.waiting) == 0
    scorer.close()


def test_a_full_queue_waits_for_its_oldest():
    gate, order = Gate(), []
    scorer, queue = Scorer(gate, ahead=1), ScoreQueue(1)
    queue.add(scorer.start(batch("a")), lambda scores: order.append("a"))
    threading.Timer(0.2, gate.open.set).start()
    queue.add(scorer.start(batch("b")), lambda scores: order.append("b"))
    assert order[0] == "a"
    queue.finish()
    scorer.close()


def test_a_reward_is_never_called_twice_at_a_time_and_several_are():
    one, two = Gate(), Gate(held=False)
    scorer = Scorer({"one": one, "two": two}, ahead=3)
    started = [scorer.start(batch(name)) for name in "abc"]
    results = [s.futures["two"].result(60) for s in started]  # while the first reward still holds its first batch
    assert len(results) == 3
    assert one.begun in ([], ["a", "a"])
    one.open.set()
    assert [s.result()["one"].shape for s in started] == [(2,)] * 3
    assert len(one.threads) == len(two.threads) == 1
    assert one.threads.isdisjoint({threading.current_thread(), *two.threads})
    scorer.close()


def test_parts_of_the_policy_score_while_it_rests():
    for reward, ahead in ((Part(held=False), 1), (Gate(held=False), 0)):
        scorer = Scorer(reward, ahead=ahead)
        assert scorer.start(batch("a")).done
        assert reward.threads == {threading.current_thread()}


def test_scores_are_those_of_scoring_in_turn():
    batches, found = [batch("a"), batch("b", 3), batch("c")], []
    for ahead in (0, 2):
        scores: list[Tensor] = []
        scorer = Scorer(Gate(held=False), ahead=ahead)
        with ScoreQueue(ahead) as queue:
            for seen in batches:
                queue.add(scorer.start(seen), lambda s, scores=scores, scorer=scorer: scores.append(scorer.stacked(s)))
        found.append(torch.cat(scores))
        scorer.close()
    assert torch.equal(*found)


def test_what_a_reward_raises_comes_out_and_nothing_more_is_begun():
    gate, order = Gate(), []
    scorer = Scorer(gate, ahead=2)

    def then(scores: Scores) -> None:
        order.append(1)

    queue = ScoreQueue(2)

    def broken() -> None:
        with queue:
            queue.add(scorer.start(batch("broken")), then)
            queue.add(scorer.start(batch("after")), then)
            gate.open.set()

    def interrupted() -> None:
        with queue:
            queue.add(scorer.start(batch("a")), then)
            raise KeyboardInterrupt

    for failing, error in ((broken, RewardError), (interrupted, KeyboardInterrupt)):
        with pytest.raises(error):
            failing()
        assert order == []
        assert not queue.waiting
    scorer.close()


def test_a_reward_beside_a_network_on_the_cpu_has_no_pool_of_threads_of_its_own():
    """Which would slow the network down; in its own turn a reward has all threads."""
    found: list[int] = []

    def reward(media: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
        found.append(torch.get_num_threads())
        return media.flatten(1).mean(1)

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for ahead in (1, 0):
            scorer = Scorer(reward, ahead=ahead)
            scorer.start(batch("one")).result()
            scorer.close()
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert found == [1, 3]
