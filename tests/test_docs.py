"""What the documentation tells people to write works as written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, settled

FENCED = re.compile(r"```(?:python|yaml)\n# ((?:flowalign|conf|tests)/\S+)\n(.*?)```", re.DOTALL)
PAGES = ("docs/architecture.md", "docs/adding-a-model.md")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the files that the documentation adds, and not a line changed elsewhere."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("flowalign", "conf", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for page in PAGES:
        for path, text in FENCED.findall((ROOT / page).read_text()):
            assert not (folder / path).exists()
            (folder / path).write_text(text)
    return folder


AWR = ("algo=awr", "algo.temperature=0.5", "algo.kl_beta=0.1")
OTHERS = ("algo=grpo", "dynamics=fading_noise", "reward=redness")


@pytest.mark.parametrize("words", [AWR, OTHERS])
def test_what_the_four_doors_show_trains(extended: Path, words: tuple[str, ...]):
    run = extended / words[0].replace("=", "_")
    overrides = settled(*TINY, f"hydra.run.dir={run}", "test=false", *words)
    done = subprocess.run(
        [sys.executable, "train.py", *overrides], cwd=extended, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_the_example_of_a_model_passes_what_every_model_has_to(extended: Path):
    words = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/models/test_families.py",
        "-k",
        "OvisImage or ovis_image",
    ]
    environment = os.environ | {"PYTHONPATH": str(extended)}
    done = subprocess.run(
        [sys.executable, *words], cwd=extended, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-300:]
    assert int(passed[1]) > 12  # the whole contract


def test_the_example_of_an_algorithm_is_twenty_lines():
    pages = dict(FENCED.findall((ROOT / "docs/architecture.md").read_text()))
    assert len(pages["flowalign/algorithms/awr.py"].strip().splitlines()) <= 20
