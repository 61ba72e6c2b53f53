"""The measuring program runs and its figures hang together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY


@pytest.mark.slow
def test_the_bench_measures_floor_and_epoch(tmp_path: Path):
    command = [
        sys.executable,
        "bench/epoch.py",
        "--epochs",
        "1",
        "--only",
        "nft_lora",
        "grpo_full",
        "--to",
        str(tmp_path),
    ]
    ours = ("tune=", "trainer.max_epochs", "trainer.check_val")  # the bench sets these itself
    tiny = [o for o in TINY if not o.startswith(ours)]
    subprocess.run([*command, *tiny], cwd=ROOT, check=True, timeout=600)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["workload"] for row in rows] == ["nft_lora", "grpo_full"]
    for row in rows:
        assert 0 < row["floor_s"] < 2 * row["actual_s"]
        assert row["efficiency"] == pytest.approx(row["floor_s"] / row["actual_s"], rel=0.01)
        assert row["images_per_s"] == pytest.approx(4 / row["actual_s"], rel=0.01)
        assert row["peak_rss_mb"] > 100
        assert row["raw_fwd_units"] > 4  # four steps at the very least


@pytest.mark.slow
def test_an_epoch_is_given_in_bare_forwards(tmp_path: Path):
    """The workload of the other systems, cut short: 8 pictures in 3 steps, 2 of them trained on."""
    few = ("batch.prompts=1", "batch.updates=1", "rollout.num_steps=3")
    command = [sys.executable, "bench/baseline.py", "--epochs", "1", "--only", "nft_lora", "--to", str(tmp_path), *few]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    (row,) = json.loads((tmp_path / "baseline.json").read_text())["rows"]
    assert (row["workload"], row["epochs"], row["compiled"]) == ("nft_lora", 1, False)
    assert row["units"] == pytest.approx(row["rollout_units"] + row["optimise_units"], abs=0.2)
    assert row["rollout_units"] > 2  # three forwards, on a machine that others disturb
    assert row["units"] == pytest.approx(row["epoch_s"] / row["forward_s"], rel=0.05)
    assert row["first_epoch_s"] > 0


@pytest.mark.slow
def test_the_check_of_large_models_runs_at_small_sizes(tmp_path: Path):
    command = [sys.executable, "bench/gpu_check.py", "--tiny", "--to", str(tmp_path), "trainer.accelerator=cpu"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["model"], row["algo"]) for row in rows] == [
        (model, algo) for model in ("sd3_5_medium", "flux1_dev", "wan2_1_t2v") for algo in ("grpo", "nft")
    ]
    for row in rows:
        assert row["samples_per_s"] == pytest.approx(row["samples"] / row["epoch_s"])
        assert row["planned_gib"] > 0
        if row["algo"] == "grpo":
            assert row["on_policy_gap"] < 1e-5
