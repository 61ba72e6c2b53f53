"""The guard against hacked rewards: on made-up evaluations, and on a reward that is hacked."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowalign.callbacks.hacking_guard import HackingGuard
from tests.conftest import ROOT

BASELINE = (0.5, 0.6)


def judged(guard: HackingGuard, *evaluations: tuple[float, float]) -> list[bool]:
    """Verdicts of evaluations as (objective, gold), the first one before training."""
    return [guard.judge(*numbers, epoch) for epoch, numbers in enumerate(evaluations, start=-1)]


def test_a_rising_objective_with_a_falling_gold_is_said_once_with_the_numbers(caplog: Any):
    with caplog.at_level(logging.WARNING, "flowalign"):
        verdicts = judged(HackingGuard(), BASELINE, (0.6, 0.65), (0.7, 0.62), (0.8, 0.6), (0.9, 0.5))
    assert verdicts == [False, False, False, True, True]
    assert len(caplog.messages) == 1
    assert (
        "val/reward rose from 0.600 to 0.800 while val/quality fell from 0.650 (after epoch 0) to 0.600" in caplog.text
    )


def test_only_the_first_rank_says_so_and_all_come_to_the_same_verdict(caplog: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    with caplog.at_level(logging.WARNING, "flowalign"):
        assert judged(HackingGuard(patience=1), BASELINE, (0.8, 0.5)) == [False, True]
    assert not caplog.messages


@pytest.mark.parametrize(
    "evaluations",
    [
        [(0.6, 0.59), (0.7, 0.585), (0.8, 0.581)],  # within the tolerance
        [(0.4, 0.5), (0.3, 0.4), (0.2, 0.3)],  # both fall: a collapse, but no hack
        [(0.6, 0.5), (0.7, 0.6), (0.8, 0.5)],  # not in a row
        [(0.6, 0.7), (0.7, 0.8), (0.8, 0.9)],
        [(0.6, float("nan")), (0.7, float("nan")), (0.8, float("nan"))],
    ],
)
def test_anything_else_is_no_hack(evaluations: list[tuple[float, float]]):
    assert not any(judged(HackingGuard(), BASELINE, *evaluations))


def test_what_could_not_be_scored_neither_hides_a_hack_nor_forgets_it():
    nan = float("nan")
    assert judged(HackingGuard(), (0.5, nan), (0.6, 0.9), (0.7, 0.5), (nan, 0.4), (0.8, 0.3)) == [False] * 4 + [True]


def test_a_second_event_is_said_again(caplog: Any):
    low, high = (0.7, 0.5), (0.7, 0.6)
    judged(HackingGuard(), BASELINE, low, low, high, low, low, low)
    assert len(caplog.messages) == 2


def test_a_resumed_guard_goes_on_where_the_other_one_stopped():
    first, second = HackingGuard(patience=3), HackingGuard(patience=3)
    judged(first, BASELINE, (0.6, 0.5), (0.7, 0.5))
    second.load_state_dict(first.state_dict())
    assert second.judge(0.8, 0.5, 2)


def test_impossible_settings_are_refused():
    for settings in ({"tolerance": -1.0}, {"patience": 0}):
        with pytest.raises(ValueError, match="tolerance is 0 or more"):
            HackingGuard(**settings)


def test_a_measure_that_does_not_exist_is_refused_before_training(tiny: Any, tmp_path: Path):
    from flowalign.checks import ConfigError
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    cfg = tiny("callbacks=hacking_guard", "callbacks.hacking_guard.gold=val/qualty")
    recipe = build_recipe(cfg)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    with pytest.raises(ConfigError, match="asks for val/qualty, and there are .*val/quality"):
        trainer.validate(AlignModule(recipe), verbose=False)


@pytest.mark.slow
def test_a_reward_that_is_easily_hacked_is_found_out(tmp_path: Path):
    """The embedded model, paid for light pictures."""
    words = (
        "reward=brightness", "callbacks=[checkpoint,hacking_guard]", "batch.prompts=4", "batch.group_size=8",
        "batch.micro=32", "optimizer.lr=1e-3", "rollout.num_steps=6", "evaluation.sampling.num_steps=6",
        "evaluation.num_val=32", "trainer.max_epochs=20", "trainer.check_val_every_n_epoch=2", "test=false",
        "logger=csv", "callbacks.hacking_guard.stop=true", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (done.stdout + done.stderr).count("the reward is being hacked: val/reward rose from") == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["epochs"] < 20  # it stopped
    assert summary["final"]["val/reward"] > summary["baseline"]["val/reward"]
    assert summary["final"]["val/quality"] < summary["baseline"]["val/quality"] - 0.02
    assert list((tmp_path / "checkpoints").glob("best_gold_epoch*.ckpt"))
