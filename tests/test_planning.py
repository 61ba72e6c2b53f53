"""The batch plan of a command line, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.types import RunMode

from flowalign.checks import ConfigError
from flowalign.planning import check_plan, devices, replicas
from flowalign.run import assemble, build_recipe, build_trainer


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("batch.micro=7",), r"72 training points .* batch.micro=7: use batch.micro=8\.$"),
        (("trainer.devices=5",), r"cannot be dealt to 5 ranks: use batch.prompts=10\.$"),
        (("reward=shapes_win_rate", "batch.prompts=11", "trainer.devices=2"), r"2 ranks in whole groups"),
        (
            ("reward=shapes_win_rate", "callbacks=early_stopping"),
            r"monitor=val/reward .*: use val/strict or val/quality",
        ),
        (("reward=judge_ranking", "callbacks=early_stopping"), r"use a measure that you add under reward.held_out"),
        (
            ("trainer.limit_train_batches=0.5", "batch.micro=288", "batch.updates=1"),
            r"leaves none of an epoch's batches \(1\)",
        ),
        (
            ("callbacks=[default,hacking_guard]", "callbacks.best.monitor=val/quality"),
            r"callbacks.best and callbacks.best_gold keep the same checkpoint, by monitor=val/quality: leave one out",
        ),
        (("algo=tempflow", "batch.group_size=10"), r"trunks of 12 branches: use batch.group_size=12"),
        (("algo=crd", "batch.micro=1"), r"batch.micro=1 leaves .* nothing can be learnt: use batch.micro=2\.$"),
        (("algo=awm", "algo.off_policy=true", "frozen.old.decay.kind=2"), r"frozen.old for the weights .*decay.kind=0"),
        (("algo=awm", "algo.off_policy=true", "frozen.old.every=step", "+frozen.old.interval=2"), "and no interval"),
        (("dynamics=cps", "dynamics.eta=2.3"), r"^dynamics: CPS needs eta in \[0, 2\) \(got 2.3\)"),
        (("credit=energies", "credit.clip=0"), "^credit: temperature and clips must be positive"),
        (("times=stratified", "times.share=0.05"), r"times.share=0.05 of 6 steps leaves no noise level: use a larger"),
        (("algo=mixgrpo", "steps.parity=true", "steps.stay=1"), r"2 steps of a picture in epoch 0 and 1 in epoch 7"),
    ],
)
def test_a_plan_is_refused_from_the_config_alone(compose: Callable[..., Any], words: tuple[str, ...], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        check_plan(compose(*words))


@pytest.mark.parametrize("sweeper", ["Basic", "Optuna"])
@pytest.mark.parametrize("word", ["reward=shapes_win_rate", "reward=shapes"])
def test_a_sweep_is_told_at_once_that_its_metric_has_no_value(
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    sweeper: str,
    word: str,
):
    """A search would be in vain; the runs of a grid may be of use without a comparison."""
    cfg = compose(word)
    node = SimpleNamespace(mode=RunMode.MULTIRUN, sweeper=SimpleNamespace(_target_=f"hydra.{sweeper}Sweeper"))
    patched = SimpleNamespace(get=lambda: node, initialized=lambda: True)
    monkeypatch.setattr("flowalign.planning.HydraConfig", patched)
    said = "optimized_metric=val/reward has no value with this reward, .*: use val/strict or val/quality"
    unmeasured = word == "reward=shapes_win_rate"
    with pytest.raises(ConfigError, match=said) if unmeasured and sweeper == "Optuna" else nullcontext():
        check_plan(cfg)
    assert bool(re.search(said, caplog.text)) == (unmeasured and sweeper == "Basic")


HIDDEN = (
    "reward.objective._target_=flowalign.scoring.Measure",
    "+reward.objective.evaluate=false",
    "+reward.objective.reward._target_=flowalign.rewards.brightness.Brightness",
)


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((), ["best_epoch{epoch:03d}", "last"]),
        (("reward=shapes_win_rate",), ["last"]),
        (("reward=remote", "reward.objective.groupwise=true"), ["last"]),
        (("reward=shapes_win_rate", "callbacks.best.monitor=val/strict"), ["best_epoch{epoch:03d}", "last"]),
        (("reward=brightness", *HIDDEN), ["last"]),
    ],
)
def test_no_checkpoint_is_the_best_by_a_reward_that_evaluations_do_not_measure(
    compose: Callable[..., Any], words: tuple[str, ...], kept: list[str]
):
    cfg = compose("logger=none", "trainer.accelerator=cpu", *words)
    assert [callback.filename for callback in build_trainer(cfg, 1).checkpoint_callbacks] == kept


def test_checkpoints_are_written_after_what_they_record(compose: Callable[..., Any]):
    """Each saves the state of all, of which that of the best checkpoint changes in the same epoch."""
    cfg = compose("callbacks=[milestones,default]", "callbacks.milestones.every_n_epochs=1", "logger=none")
    written = build_trainer(cfg, 1).checkpoint_callbacks
    assert [callback.filename for callback in written] == ["best_epoch{epoch:03d}", "epoch{epoch:03d}", "last"]


def test_a_share_of_levels_that_nobody_draws_is_no_obstacle(compose: Callable[..., Any]):
    check_plan(compose("algo=grpo", "times=stratified", "times.share=0.05"))


@pytest.mark.parametrize("words", [("algo.off_policy=true",), ("frozen.old.decay.kind=2",)])
def test_a_copy_that_lags_is_no_obstacle_where_it_did_not_make_the_rollout(compose: Callable[..., Any], words: Any):
    check_plan(compose("algo=awm", *words))


def test_prompts_that_are_not_there_are_refused_before_the_model_is_loaded(compose: Callable[..., Any], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^data.train: there is no prompt file"):
        build_recipe(compose("data=folder", f"data.folder={tmp_path}", f"model.pretrained={tmp_path}/no_model"))


def test_prompts_are_read_before_the_networks_of_the_rewards(compose: Callable[..., Any], tmp_path: Path):
    reward = ("reward=pickscore", f"reward.objective.pretrained={tmp_path}/no_reward")
    with ExitStack() as cleanup, pytest.raises(ConfigError, match=r"^data.train: there is no prompt file"):
        assemble(compose("data=folder", f"data.folder={tmp_path}", *reward), None, cleanup)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("batch.prompts=many", "^batch.prompts: expected an integer, got 'many'"),
        ("batch.micro=0", r"^batch: batch.micro must be at least 1 \(got 0\)"),
        (
            "rollout.num_steps=1",
            r"a window of 2 does not fit into 1 steps .* use steps.width=1, or rollout.num_steps=4",
        ),
    ],
)
def test_the_parts_of_a_plan_are_refused_in_their_own_words(compose: Callable[..., Any], word: str, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        check_plan(compose("algo=mixgrpo", word))


def test_devices_are_counted_as_the_trainer_counts_them(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    import torch
    from omegaconf import DictConfig

    def counted(given: Any, accelerator: str = "gpu") -> int:
        return devices(DictConfig({"devices": given, "accelerator": accelerator}))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert [counted(given) for given in (3, "3", [0, 2], "0,2", "0,", "auto", -1, "-1")] == [3, 3, 2, 2, 1, 8, 8, 8]
    assert [counted(given, "cpu") for given in (3, "auto", -1)] == [3, 1, 1]
    cfg = compose("trainer.devices=[0,2,3]", "trainer.num_nodes=2", "strategy=fsdp")
    assert replicas(cfg) == 6
    cfg.trainer.strategy.context = 3
    assert replicas(cfg) == 2
    monkeypatch.setenv("WORLD_SIZE", "9")  # torchrun knows better
    assert replicas(cfg) == 3
