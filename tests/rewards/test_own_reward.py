"""A reward of somebody's own folder, as docs/rewards.md tells people to write it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, settled

FENCED = re.compile(r"```(?:python|yaml)\n# (my_\S+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the files of the page, and nothing else."""
    for path, text in FENCED.findall((ROOT / "docs/rewards.md").read_text()):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), "--config-dir", "my_conf", "reward=mine"]
    overrides = settled(*TINY, "hydra.run.dir=run", "logger=none", "test=false", *words)
    return subprocess.run([*command, *overrides], cwd=folder, capture_output=True, text=True, timeout=280)


def test_the_example_of_the_page_trains(folder: Path, sd3_folder: Path):
    random = (f"model.pretrained={sd3_folder}", "model.max_sequence_length=4")
    done = train(folder, "reward.objective.blue=0.8", *random)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    final = json.loads((folder / "run" / "summary.json").read_text())["final"]
    assert {"val/reward", "val/asked", "val/jpeg"} <= final.keys()


def test_a_failing_check_ends_the_command_before_anything_is_loaded(folder: Path):
    reward = folder / "my_rewards.py"
    reward.write_text(reward.read_text().replace("if not redness", "if redness"))
    done = train(folder, "model.pretrained=/nowhere")
    assert done.returncode == 2
    assert "reward `asked` (Asked): blue is redder than red." in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    misspelt = train(folder, "reward.objective.bleu=1")
    assert misspelt.returncode == 2
    assert "reward.objective.bleu" in misspelt.stderr
