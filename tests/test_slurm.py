"""The cases of bench/slurm_runs.py as tests: jobs of a real SLURM, started for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import faults, slurm_runs
from bench.faults import Outcome
from bench.slurm import cluster, lacking
from bench.slurm_runs import Slurm
from tests.conftest import installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(bool(lacking()), reason=lacking()),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    faults.prepare()
    folder: Path = tmp_path_factory.mktemp("slurm")
    with cluster(folder / "slurm") as here:
        yield Slurm(folder, here)


def outcomes(slurm: Slurm, case: str) -> list[Outcome]:
    return list(slurm_runs.CASES[case](slurm))


def check_restarted_once(row: Outcome) -> None:
    assert row.codes.endswith("0 COMPLETED"), row
    assert (row.equal, row.said) == ("1 of 1", "1 restarts; asked for once"), row


@pytest.mark.parametrize("case", ["requeued", "ranks"])
def test_a_job_asked_to_stop_starts_again_once_and_ends_as_if_nothing_had_happened(slurm: Slurm, case: str):
    for row in outcomes(slurm, case):
        check_restarted_once(row)
        assert int(row.lost) <= 1, row


def test_a_cancelled_job_leaves_what_another_goes_on_from(slurm: Slurm):
    for row in outcomes(slurm, "cancelled"):
        assert row.codes == "143 143 CANCELLED", row
        assert row.equal == "1 of 1", row


def test_one_job_of_an_array_starts_again_alone(slurm: Slurm):
    asked, other = outcomes(slurm, "array")
    check_restarted_once(asked)
    assert (other.codes, other.equal) == ("0 COMPLETED", "1 of 1"), other
    assert other.said.startswith("0 restarts"), other


def test_tasks_that_are_not_the_devices_are_refused_in_a_sentence(slurm: Slurm):
    for row in outcomes(slurm, "refused"):
        assert row.codes.endswith("2 FAILED"), row
        assert row.said.startswith("error: "), row


@pytest.mark.skipif(not installed("hydra_plugins.hydra_submitit_launcher"), reason="needs the extra slurm")
def test_runs_of_a_sweep_are_jobs_and_go_on_after_a_preemption(slurm: Slurm):
    preempted, other = outcomes(slurm, "sweep")
    assert preempted.said.startswith("1 restarts"), preempted
    assert other.said.startswith("0 restarts"), other
    for row in (preempted, other):
        assert row.codes.endswith("0 COMPLETED"), row
        assert row.equal == "1 of 1", row
        assert row.said.endswith("sweep: 0"), row
