"""The table and the file at the end of a sweep."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest

from flowalign.sweep_results import read_results, table, write_results

COMMON = {"algo=grpo", "test=false"}


def ended(folder: Path, value: float | None, *words: str, other: float = 1.0) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(["algo=grpo", "test=False", *words]))
    (folder / ".hydra" / "config.yaml").write_text("optimized_metric: val/reward\n")
    final = {"val/reward": value, "val/strict": other}
    (folder / "summary.json").write_text(json.dumps({"baseline": {"val/reward": 0.0}, "final": final}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    ended(tmp_path / "0", 0.25, "dynamics.eta=0.3", "seed=0")
    ended(tmp_path / "1", 0.75, "dynamics.eta=0.3", "seed=1")
    ended(tmp_path / "2", 0.6, "dynamics.eta=0.7", "seed=0")
    ended(tmp_path / "10", None, "dynamics.eta=0.9", "seed=0")
    ended(tmp_path / "11", 0.99, "dynamics.eta=5", "seed=0")  # of an earlier attempt, which then failed
    return tmp_path


def test_settings_are_ranked_by_their_mean_over_seeds(sweep: Path):
    assert table(read_results(sweep, COMMON, {"11"})) == [
        " 0.6000  dynamics.eta=0.7 seed=0  in 2",
        f" 0.5000 ± {statistics.stdev([0.25, 0.75]):.4f}  dynamics.eta=0.3  2 seeds, in 0, 1",
        "    nan  dynamics.eta=0.9 seed=0  in 10",
    ]


def test_seeds_alone_make_one_line(tmp_path: Path):
    for seed in (0, 1):
        ended(tmp_path / str(seed), 0.5, f"seed={seed}")
    assert table(read_results(tmp_path, COMMON, ())) == [" 0.5000 ± 0.0000  2 seeds, in 0, 1"]


def test_seeds_of_which_one_has_no_value_make_a_line(tmp_path: Path):
    for seed, value in enumerate((0.5, None)):
        ended(tmp_path / str(seed), value, f"seed={seed}")
    assert table(read_results(tmp_path, COMMON, ())) == ["    nan ± nan  2 seeds, in 0, 1"]


def test_the_file_has_the_options_and_metrics_of_every_run(sweep: Path):
    write_results(read_results(sweep, COMMON, {"11"}), sweep / "sweep.csv")
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    assert [row["run"] for row in rows] == ["0", "1", "2", "10"]
    assert [row["seed"] for row in rows] == ["0", "1", "0", "0"]
    assert [float(row["dynamics.eta"]) for row in rows] == [0.3, 0.3, 0.7, 0.9]
    assert [row["val/reward"] for row in rows] == ["0.25", "0.75", "0.6", "nan"]
    assert {row["val/strict"] for row in rows} == {"1.0"}


def test_an_evaluation_without_training_counts_with_its_baseline(tmp_path: Path):
    ended(tmp_path / "0", 0.5, "seed=0")
    (tmp_path / "0" / "summary.json").write_text(json.dumps({"baseline": {"val/reward": 0.125}, "final": {}}))
    assert [result.value for result in read_results(tmp_path, COMMON, ())] == [0.125]


def test_the_file_has_no_signs_of_hydra(tmp_path: Path):
    ended(tmp_path / "0", 0.5, "+reward.weights.jpeg=1.0", "task_name='a, b'", "~schedule")
    write_results(read_results(tmp_path, COMMON, ()), tmp_path / "sweep.csv")
    row = next(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert (row["reward.weights.jpeg"], row["task_name"], row["~schedule"]) == ("1.0", "a, b", "")
