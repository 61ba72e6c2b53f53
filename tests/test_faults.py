"""The cases of bench/faults.py as tests: real processes and signals, with fewer repetitions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import faults
from bench.faults import Bench, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    faults.prepare()
    return Bench(tmp_path_factory.mktemp("faults"), kills=3)


def outcomes(bench: Bench, case: str) -> list[Outcome]:
    found = list(faults.CASES[case](bench))
    assert not [one for one in found if one.hung], faults.table(found)
    return found


def test_a_killed_run_repeats_one_epoch_at_most_and_ends_the_same(bench: Bench):
    (row,) = outcomes(bench, "killed")
    assert (row.codes, row.equal) == ("-9", "3 of 3")
    assert int(row.lost) <= 1


def test_sigterm_to_any_rank_at_any_moment_stops_both_and_loses_nothing(bench: Bench):
    for row in outcomes(bench, "terminated"):
        assert (row.codes, row.equal) == ("143", "1 of 1"), row
        assert "ckpt_path=" in row.said


def test_the_other_rank_ends_too_and_says_which_one_died(bench: Bench):
    for row in outcomes(bench, "dead_rank"):
        dead = row.case.split("rank ")[1][0]
        assert row.codes == "-9 1", row
        assert row.said.startswith(f"rank {dead} "), row
        assert float(row.seconds) < 60, row


def test_what_lightning_has_started_ends_with_the_first_process(bench: Bench):
    dead, *stopped = outcomes(bench, "launched")
    assert dead.codes in ("1", "-9")  # Lightning's own observer may be quicker, and kills
    assert [row.codes for row in stopped] == ["143", "143"]


def test_torchrun_ends_and_its_ranks_with_it(bench: Bench):
    """Whichever rank dies or is asked to stop; the exit code is torchrun's own."""
    for row in outcomes(bench, "torchrun"):
        assert (row.codes, row.equal) == ("1", "1 of 1"), row
        assert float(row.seconds) < 60, row


def test_slurm_is_asked_to_start_the_job_again(bench: Bench):
    (row,) = outcomes(bench, "requeued")
    assert (row.codes, row.equal) == ("138", "1 of 1")
    assert "`requeue 7`" in row.case


def test_ctrl_c_leaves_no_process(bench: Bench):
    (row,) = outcomes(bench, "interrupted")
    assert row.codes == "130"
    assert ": 0 left" in row.case, row


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
def test_a_full_disk_keeps_the_last_checkpoint(bench: Bench):
    (row,) = outcomes(bench, "disk")
    assert row.codes == "1"
    assert "No space left" in row.said


@pytest.mark.parametrize("case", ["checkpoints", "another_base", "two"])
def test_what_cannot_work_is_refused_in_a_sentence(bench: Bench, case: str):
    for row in outcomes(bench, case):
        assert row.codes == "2", row
        assert "EXECUTED" not in row.case


def test_damaged_prompts_are_encoded_again(bench: Bench):
    (row,) = outcomes(bench, "cache")
    made, there = row.case.split()[2], row.case.split()[4]
    assert (row.codes, row.equal, made) == ("0", "1 of 1", there)


def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(bench: Bench):
    assert [row.codes for row in outcomes(bench, "not_finite")] == ["0", "0", "1"]


def test_memory_that_does_not_suffice_is_told_by_phase(bench: Bench):
    evaluation, rollout = outcomes(bench, "memory")
    assert evaluation.codes == rollout.codes == "1"
    assert "'evaluate'" in evaluation.said
    assert "'rollout'" in rollout.said


def test_a_folder_is_reused_after_it_was_left(tmp_path: Path, bench: Bench):
    """ckpt_path=auto begins where there is nothing to go on from."""
    assert bench.resumed(tmp_path / "fresh")
