"""Four epochs equal two and two, for every algorithm, kind of tuning and strategy, to the last bit.

python -m pytest tests/resuming -m "slow or not slow"
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.resuming.cells import ALGORITHMS, CHOSEN, EPOCHS, check_equal, held, jobs, rows, scalars
from tests.strategies.jobs import Job, run, together

QUICK = {("mixgrpo", "lora"), ("dgpo", "full")}
"""Of the matrix, what runs always: a window that moves, and frozen copies that follow every step and every rollout."""
ALONE = [
    pytest.param(algo, kind, marks=[] if (algo, kind) in QUICK else pytest.mark.slow)
    for algo in ALGORITHMS
    for kind in ("lora", "full")
]


@pytest.mark.parametrize(("algo", "kind"), ALONE)
def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path: Path, algo: str, kind: str):
    straight, first, second = jobs(tmp_path, algo, kind)
    for job in (straight, first, second):
        run(job)
    check_equal(straight, second)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_interrupted_runs_of_two_processes_are_the_uninterrupted_ones(tmp_path: Path, algo: str):
    ddp, fsdp = jobs(tmp_path, algo, "lora_ddp"), jobs(tmp_path, algo, "full_fsdp")
    together([*ddp, *fsdp], tmp_path)
    for straight, _, second in (ddp, fsdp):
        check_equal(straight, second)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes minutes where others work too
@pytest.mark.parametrize(("algo", "kind"), [("grpo", "lora_compiled"), ("nft", "full_compiled")])
def test_an_interrupted_run_of_compiled_blocks_is_the_uninterrupted_one(tmp_path: Path, algo: str, kind: str):
    """Sizes come in another order: only the first run begins with a baseline."""
    straight, first, second = jobs(tmp_path, algo, kind)
    for job in (straight, first, second):
        torch._dynamo.reset()  # as a process of its own
        run(job)
    check_equal(straight, second)


def test_the_window_of_the_matrix_moves():
    """Otherwise its row shows nothing about the state of the window."""
    from flowalign.steps.window import Window

    assert CHOSEN["mixgrpo"] == ("rollout.num_steps=6", "steps.stay=1")
    places = [Window(2, seed=0, stay=1)(epoch, 6).trained for epoch in range(EPOCHS)]
    assert len(set(places)) == 3


def test_a_run_that_is_torn_in_the_middle_of_an_epoch_repeats_that_epoch(tmp_path: Path):
    """Its rollout was logged already: the CSV file has it once, TensorBoard the same point twice."""
    straight, first, second = jobs(tmp_path, "nft", "lora", torn=True)
    for job in (straight, first, second):
        run(job)
    check_same_but_shown_twice(straight, second)


def check_same_but_shown_twice(straight: Job, torn: Job) -> None:
    assert rows(straight) == rows(torn)
    one, other = scalars(straight), scalars(torn)
    twice = {tag for tag in one if other[tag] != one[tag]}
    assert {tag: set(points) for tag, points in one.items()} == {tag: set(points) for tag, points in other.items()}
    assert twice
    assert all(tag.startswith("rollout/") and max(other[tag].values()) == 2 for tag in twice)
    assert held(straight)["state_dict"].keys() == held(torn)["state_dict"].keys()
