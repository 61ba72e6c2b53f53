"""Learning from given videos: from a file of prompts to a network that matches them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowalign.checks import ConfigError
from flowalign.loggers import read_csv
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from tests.conftest import ROOT, TINY, settled

if TYPE_CHECKING:
    from omegaconf import DictConfig

EPOCHS = 8
LONG = (f"trainer.max_epochs={EPOCHS}", f"trainer.check_val_every_n_epoch={EPOCHS}")


@pytest.fixture
def fit(tiny: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., None]:
    """Training in this process; its numbers are in the temporary folder."""

    def run(*words: str) -> None:
        from flowalign.module import AlignModule

        cfg = tiny(*words)
        recipe = build_recipe(cfg)
        module = AlignModule(recipe)
        build_trainer(cfg, plan_accumulation(cfg, recipe)).fit(module)

    return run


def errors(folder: Path) -> list[float]:
    """Of flow matching, by epoch."""
    rows = read_csv(folder / "csv" / "metrics.csv")
    return [float(row["train/matching"]) for row in rows if "train/matching" in row]


def test_a_network_learns_from_given_videos_by_command(of_videos: tuple[str, ...], tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    words = settled(*TINY, *of_videos, *LONG, "logger=[csv,tensorboard]", f"hydra.run.dir={run}")
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = errors(run)
    assert len(found) == EPOCHS
    assert sum(found[-2:]) < 0.8 * sum(found[:2])
    assert (run / "before_after.png").is_file()
    events = EventAccumulator(str(run / "tensorboard"), {"images": 0})
    events.Reload()
    shown = events.Images("rollout/pictures")[0]
    assert (shown.width, shown.height) == (2 * 48, 32)  # a frame of each prompt's video


def test_a_network_that_is_not_trained_matches_no_better(
    fit: Callable[..., None], of_videos: tuple[str, ...], tmp_path: Path
):
    """Without which the test above would say nothing."""
    fit(*of_videos, *LONG, "optimizer.lr=0", "logger=csv")
    found = errors(tmp_path)
    assert sum(found[-2:]) > 0.95 * sum(found[:2])


@pytest.mark.parametrize(
    ("line", "algo", "sentence"),
    [
        ({"image": "0.gif"}, "sft", "train.jsonl:1: no video to learn from: .*, not an `image`.*, or algo=nft.$"),
        ({}, "prfl", "train.jsonl:1: no video to learn from: .*, or algo.sft_weight=0.$"),
        ({"video": "2.gif"}, "sft", "train.jsonl:1: there is no video .*2.gif, or algo=nft.$"),
    ],
)
def test_a_file_without_videos_is_refused_before_anything_is_made(
    fit: Callable[..., None], of_videos: tuple[str, ...], tmp_path: Path, line: Any, algo: str, sentence: str
):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a square"} | line))
    with pytest.raises(ConfigError, match=sentence):
        fit(*of_videos, f"algo={algo}")


def test_a_video_is_nothing_for_a_model_of_pictures(
    fit: Callable[..., None], of_videos: tuple[str, ...], tmp_path: Path
):
    with pytest.raises(ConfigError, match="train.jsonl:1: no image to learn from: .*, not a `video`"):
        fit("algo=sft", "data=folder", f"data.folder={tmp_path}")


def test_a_video_that_is_too_short_ends_the_run_in_a_sentence(fit: Callable[..., None], of_videos: tuple[str, ...]):
    with pytest.raises(ConfigError, match=r"train.jsonl:\d: the video .*gif has 9 frame\(s\), fewer than the 13"):
        fit(*of_videos, "++resolution.train.frames=13")
