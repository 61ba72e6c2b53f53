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
