"""The LightningModule on a random model: what an epoch computes, counts, refuses and survives."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from flowalign.checks.errors import ConfigError, RunError
from flowalign.collect import Collected
from flowalign.evaluation import Positions
from flowalign.prompts import Prompt
from flowalign.rewards.base import RewardError
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.sampler import walk
from flowalign.scoring import ScoreQueue, Scorer

if TYPE_CHECKING:
    from lightning import Trainer
    from omegaconf import DictConfig

    from flowalign.module import AlignModule, Recipe


@dataclass
class Run:
    """A recipe that may still be changed, and what is made of it."""

    cfg: DictConfig
    recipe: Recipe
    module: Any = None
    trainer: Any = None

    def build(self, *callbacks: Any) -> tuple[AlignModule, Trainer]:
        from flowalign.module import AlignModule

        self.module = AlignModule(self.recipe)
        self.trainer = build_trainer(self.cfg, plan_accumulation(self.cfg, self.recipe))
        self.trainer.callbacks.extend(callbacks)
        self.module.trainer = self.trainer
        return self.module, self.trainer

    def fit(self) -> AlignModule:
        module, trainer = self.build()
        trainer.fit(module)
        return module


@pytest.fixture
def prepared(tiny: Callable[..., DictConfig], random_sd3: tuple[str, ...]) -> Callable[..., Run]:
    def prepare(*overrides: str) -> Run:
        cfg = tiny("trainer.check_val_every_n_epoch=99", *random_sd3, *overrides)
        return Run(cfg, build_recipe(cfg))

    return prepare


class Reward:
    """The number of calls decides which samples cannot be scored; the others get their mean brightness."""

    def __init__(self, missing: Callable[[int], bool]) -> None:
        self.missing, self.seen = missing, 0

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        scores = media.mean(dim=(1, 2, 3))
        for i in range(len(scores)):
            if self.missing(self.seen):
                scores[i] = torch.nan
            self.seen += 1
        return scores


# ------------------------------------------------------------ the ratio


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
def test_the_ratio_is_one_before_the_first_update(prepared: Callable[..., Run], dynamics: str):
    run = prepared("algo=grpo", f"dynamics={dynamics}", "optimizer.lr=0.1")
    run.fit()
    metrics = run.trainer.callback_metrics
    assert metrics["train/on_policy_gap"] < 1e-5
    assert abs(metrics["train/ratio"] - 1) > 1e-4  # the second update is off policy, or the first would say nothing


def test_a_training_forward_with_another_guidance_is_found_out(prepared: Callable[..., Run]):
    run = prepared("algo=grpo")
    run.recipe.optimisation = replace(run.recipe.optimisation, guidance=3.0)
    with pytest.raises(RuntimeError, match=r"importance ratio must be 1, but it is off by .*guidance, precision"):
        run.fit()


def test_a_wrong_recorded_density_is_found_out(prepared: Callable[..., Run]):
    run = prepared("algo=grpo")
    module, trainer = run.build()
    fill = module.buffer.fill

    def spoilt(epoch: int, points: Any, *rest: Any) -> None:
        points.log_prob = points.log_prob + 0.01
        fill(epoch, points, *rest)

    module.buffer.fill = spoilt  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="off by 9.9"):
        trainer.fit(module)


# ------------------------------------------------------------ rewards and losses that are not numbers


def test_samples_without_a_score_are_survived_and_teach_nothing(prepared: Callable[..., Run]):
    run = prepared("algo=grpo", "batch.group_size=4")
    run.recipe.scorer = Scorer(Reward(lambda seen: seen == 1))
    module = run.fit()
    per_sample = len(module.buffer.points.x) // 8
    advantage = module.buffer.points.advantage.reshape(8, per_sample)
    assert (advantage[1] == 0).all()
    assert (advantage[0] != 0).any()
    assert module.stats["reward_nan_fraction"] == pytest.approx(1 / 8)
    assert all(p.isfinite().all() for p in module.live.trained().values())


@pytest.mark.parametrize("algo", ["grpo", "nft", "dgpo"])
def test_what_could_not_be_scored_leaves_no_trace_in_the_weights(
    prepared: Callable[..., Run], algo: str, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the frozen copies say of such a sample: the penalty would pull at it without a weight of 0."""
    trained = []
    for nonsense in (0.0, 100.0):
        words = ("algo.kl_beta=0.1", "batch.group_size=4", "batch.micro=4", "batch.updates=1")
        run = prepared(f"algo={algo}", *words)
        run.recipe.scorer = Scorer(Reward(lambda seen: seen in (1, 2)))
        module, trainer = run.build()
        assign_credit = Collected.assign_credit

        def spoilt(self: Any, assign_credit: Any = assign_credit, nonsense: float = nonsense) -> None:
            assign_credit(self)
            points = self.points
            assert points.counts.reshape(8, -1)[:, 0].tolist() == [True, False, False, *[True] * 5]
            assert float(points.weight.mean()) == pytest.approx(1)
            for velocity in points.frozen.values():
                velocity[~points.counts] += nonsense

        monkeypatch.setattr(Collected, "assign_credit", spoilt)
        trainer.fit(module)
        monkeypatch.undo()
        trained.append({name: p.detach().clone() for name, p in module.live.trained().items()})
        assert trainer.callback_metrics["train/kl"] < 1
    assert all(torch.equal(p, trained[1][name]) for name, p in trained[0].items())


@pytest.mark.parametrize("algo", ["grpo", "nft", "dgpo"])
def test_a_picture_that_is_not_finite_teaches_nothing_and_spoils_no_step(
    prepared: Callable[..., Run], algo: str, monkeypatch: pytest.MonkeyPatch
):
    """What the network would say of its latents is NaN, and so would be a mean in which that weighs 0."""
    trained = []
    for broken in (False, True):
        words = ("algo.kl_beta=0.1", "batch.group_size=4", "batch.micro=4", "batch.updates=1", "rollout.batch_size=8")
        run = prepared(f"algo={algo}", *words)
        run.recipe.scorer = Scorer(Reward(lambda seen: seen == 1))

        def walked(*args: Any, broken: bool = broken) -> Any:
            rollout = walk(*args)
            for t in (rollout.x0, rollout.x, rollout.x_next, rollout.log_prob) if broken else ():
                if t is not None:
                    t[1] = torch.nan
            return rollout

        monkeypatch.setattr("flowalign.rollouts.walk", walked)
        module = run.fit()
        assert module.finite.skipped == 0
        trained.append({name: p.detach().clone() for name, p in module.live.trained().items()})
    assert all(p.isfinite().all() for p in trained[1].values())
    for name, p in trained[0].items():
        torch.testing.assert_close(p, trained[1][name], rtol=0, atol=1e-7)


def test_a_reward_that_scores_nothing_stops_the_run_in_a_sentence(prepared: Callable[..., Run]):
    run = prepared()
    run.recipe.scorer = Scorer(Reward(lambda seen: True))
    with pytest.raises(RuntimeError, match="not a single picture of this epoch could be scored"):
        run.fit()


def test_a_loss_that_is_not_finite_stops_the_run_in_a_sentence(prepared: Callable[..., Run]):
    run = prepared("optimisation.max_skipped=0")
    loss = run.recipe.algorithm.loss

    def spoilt(p: Any, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = loss(p, v)
        return losses + torch.tensor([0.0, torch.inf, 0.0]), metrics

    run.recipe.algorithm.loss = spoilt  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"the loss of 1 of 3 points is not finite \(first: sigma 0\.\d+|1\.0"):
        run.fit()


def test_skipped_steps_are_those_of_their_epoch_alone(prepared: Callable[..., Run]):
    """One step of the first epoch is skipped, none of the second; nor does an interrupted fit leave any behind."""
    run = prepared("optimisation.max_skipped=2", "algo=nft", "trainer.max_epochs=2")
    loss, batches = run.recipe.algorithm.loss, count()

    def first_is_not_a_number(p: Any, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = loss(p, v)
        return losses * (torch.nan if next(batches) == 0 else 1.0), metrics

    run.recipe.algorithm.loss = first_is_not_a_number  # type: ignore[method-assign]
    module, trainer = run.build()
    module.finite.skip_step()  # as an epoch did that was interrupted before its end
    log, logged = module.log, []

    def remembering(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged.extend([value] if name == "train/skipped_steps" else [])
        log(name, value, *args, **kwargs)

    module.log = remembering  # type: ignore[method-assign]
    trainer.fit(module)
    assert logged == [1.0, 0.0]
    assert module.finite.skipped == 2


@pytest.mark.parametrize(("spoilt", "made"), [((0,), 1), ((0, 1, 2, 3), 0)])
def test_a_step_that_is_not_finite_is_left_out(prepared: Callable[..., Run], spoilt: tuple[int, ...], made: int):
    """Two steps of two micro-batches: a spoilt one takes its step with it, and nothing else."""
    run = prepared("optimisation.max_skipped=2", "algo=nft", "optimizer.weight_decay=0.1")
    loss, seen = run.recipe.algorithm.loss, iter(range(4))

    def not_a_number(p: Any, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = loss(p, v)
        return losses * (torch.nan if next(seen) in spoilt else 1.0), metrics

    run.recipe.algorithm.loss = not_a_number  # type: ignore[method-assign]
    module, trainer = run.build()
    trainer.fit(module)
    assert trainer.global_step == 2  # counted, so that schedules end with the run
    assert trainer.callback_metrics["train/skipped_steps"] == module.finite.skipped == 2 - made
    steps = {float(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == ({float(made)} if made else set())
    assert all(p.isfinite().all() for p in module.live.trained().values())
    if made:
        assert trainer.callback_metrics["train/loss"].isfinite()


def test_diagnostics_are_means_of_their_epoch_alone(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch):
    """Also of the first epoch after a fit that was interrupted within one."""
    run = prepared("algo=nft", "trainer.max_epochs=2")
    module, trainer = run.build()
    losses: list[float] = []

    def watched(idx: Tensor, batch_idx: int) -> Tensor:
        loss = type(module).training_step(module, idx, batch_idx)
        losses.append(float(loss.detach()))
        if len(losses) == 3:
            raise KeyError
        return loss

    monkeypatch.setattr(module, "training_step", watched)
    with pytest.raises(KeyError):
        trainer.fit(module)
    again, logged = build_trainer(run.cfg, plan_accumulation(run.cfg, run.recipe)), []
    end = type(module).on_train_epoch_end
    monkeypatch.setattr(
        module, "on_train_epoch_end", lambda: (end(module), logged.append(float(again.callback_metrics["train/loss"])))
    )
    again.fit(module)
    per_epoch = module.geometry.batches_per_epoch
    means = [sum(losses[i : i + per_epoch]) / per_epoch for i in range(3, len(losses), per_epoch)]
    assert len(means) == 2
    assert logged == pytest.approx(means, rel=1e-6)
    assert means[0] != pytest.approx(means[1], rel=1e-3)


def test_points_are_gone_before_the_next_ones_are_made(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch):
    run = prepared("algo=grpo", "trainer.max_epochs=2")
    module, trainer = run.build()
    alive: list[bool] = []
    points: list[weakref.ref] = []

    def walked(*args: Any) -> Any:
        alive.extend(point() is not None for point in points)
        return walk(*args)

    def watched(idx: Tensor, batch_idx: int) -> Tensor:
        points[:] = [weakref.ref(module.buffer.points.x), weakref.ref(module.buffer.points.x_next)]
        return type(module).training_step(module, idx, batch_idx)

    monkeypatch.setattr("flowalign.rollouts.walk", walked)
    monkeypatch.setattr(module, "training_step", watched)
    trainer.fit(module)
    assert alive
    assert not any(alive)


# ------------------------------------------------------------ copies and counts


@pytest.mark.parametrize(
    ("overrides", "copies"),
    [
        (("algo=grpo",), set()),
        (("algo=grpo", "algo.kl_beta=0.04"), {"reference"}),
        (("algo=nft", "algo.kl_beta=0"), {"old"}),
        (("algo=nft", "algo.kl_beta=0.01", "evaluation.weights=ema"), {"old", "reference", "ema"}),
    ],
)
def test_only_copies_that_somebody_consults_are_made(prepared: Callable[..., Run], overrides: Any, copies: set[str]):
    module, _ = prepared(*overrides).build()
    module.configure_model()
    assert set(module.live.copies) == copies


def test_an_algorithm_without_its_copies_rule_is_refused(prepared: Callable[..., Run]):
    module, _ = prepared("algo=nft", "frozen.old=null").build()
    with pytest.raises(ValueError, match=r"consults \['old'\], but `frozen` does not say"):
        module.configure_model()


def test_an_average_without_its_rule_is_refused(prepared: Callable[..., Run]):
    module, _ = prepared("evaluation.weights=ema", "frozen.ema=null").build()
    with pytest.raises(ConfigError, match=r"consults \['ema'\], but .*: leave frozen.ema as by default"):
        module.configure_model()


@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_the_network_is_called_as_often_as_counted_and_frozen_copies_once_an_epoch(
    prepared: Callable[..., Run], algo: str
):
    run = prepared(f"algo={algo}", "algo.kl_beta=0.01", "batch.passes=2")
    forward, rows = run.recipe.model.forward, {"grad": 0, "no_grad": 0}

    def counted(x: Tensor, t: Tensor, branch: Any) -> Tensor:
        rows["grad" if torch.is_grad_enabled() else "no_grad"] += len(x)
        return forward(x, t, branch)

    run.recipe.model.forward = counted  # type: ignore[method-assign]
    module = run.fit()
    points, copies = 4 * 3, {"grpo": 1, "nft": 2}[algo]
    assert rows["grad"] == module.counts["train"] == 2 * points  # two passes
    # Flow-GRPO's groups start from the same noise: the first step is walked once for each of the two.
    assert module.counts["rollout"] == {"grpo": 2 + 3 * 4, "nft": 4 * 4}[algo]
    assert module.counts["frozen"] == copies * points  # whatever the number of passes
    assert rows["no_grad"] == module.counts["rollout"] + module.counts["frozen"]
    assert module.counts["samples"] == 4


def test_optimiser_steps_follow_the_plan_and_the_old_policy_follows_them(prepared: Callable[..., Run]):
    run = prepared("algo=nft", "algo.kl_beta=0", "optimizer.lr=0.01")
    module, trainer = run.build()
    module.configure_model()
    start = {name: p.detach().clone() for name, p in module.live.trained().items()}
    trainer.fit(module)
    assert trainer.global_step == 2
    decay = run.recipe.frozen["old"].decay(2)
    assert 0 < decay < 1
    moved = 0.0
    for name, live in module.live.trained().items():
        old = module.live.copies["old"][name.replace(".", "/")]
        assert torch.allclose(old, decay * start[name] + (1 - decay) * live, atol=1e-7)
        moved = max(moved, float((old - live.detach()).abs().max()))
    assert moved > 1e-6


def test_training_moves_the_trained_weights_and_nothing_else(prepared: Callable[..., Run]):
    run = prepared("algo=grpo")
    module, trainer = run.build()
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.live.named_parameters()}
    trainer.fit(module)
    moved = {name for name, p in module.live.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_accumulation_set_by_hand_is_refused(prepared: Callable[..., Run]):
    module, trainer = prepared().build()
    trainer.accumulate_grad_batches = 1
    with pytest.raises(ValueError, match=r"follows from the batch plan \(2\)"):
        trainer.fit(module)


def test_a_picture_size_that_the_model_cannot_make_is_refused_before_training(prepared: Callable[..., Run]):
    from flowalign.size import Size

    run = prepared()
    run.recipe.eval_size = Size(70, 64)
    with pytest.raises(ValueError, match="cannot make pictures of 70×64"):
        run.build()


def test_a_size_that_given_pictures_cannot_have_is_refused_before_training(prepared: Callable[..., Run]):
    with pytest.raises(ConfigError, match=r"the scenes world draws squares: use resolution.train.width=64"):
        prepared("algo=sft", "resolution.train.width=96").build()


# ------------------------------------------------------------ scoring beside sampling


def test_scoring_beside_sampling_changes_nothing(prepared: Callable[..., Run]):
    """Four batches of a picture each in rollouts and evaluations."""
    found = []
    for ahead in (0, 2):
        run = prepared("algo=nft", "rollout.batch_size=1", "evaluation.sampling.batch_size=1", f"reward.ahead={ahead}")
        module = run.fit()
        metrics = run.trainer.validate(module, verbose=False)[0]
        found.append(({n: p.detach().clone() for n, p in module.live.trained().items()}, metrics, module.shown["val"]))
        run.recipe.scorer.close()
    (weights, metrics, shown), (others, same, also) = found
    assert all(torch.equal(p, others[name]) for name, p in weights.items())
    assert metrics == same
    assert torch.equal(shown.images, also.images)
    assert shown.prompts == also.prompts
    assert all(torch.equal(values, also.scores[name]) for name, values in shown.scores.items())


class Slow:
    """The mean brightness of pictures, when it is let and a while later."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.open = seconds, threading.Event()
        self.open.set()

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        if not self.open.wait(20):
            raise RewardError("nobody opened.")
        time.sleep(self.seconds)
        return media.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("words", ["algo=nft", "algo=grpo algo.kl_beta=0.1", "algo=dpo batch.group_size=4"])
def test_frozen_copies_consulted_beside_scoring_say_the_same(prepared: Callable[..., Run], words: str):
    """Of dpo, rewards choose the points, so that they are waited for."""
    found = []
    for ahead, seconds in ((0, 0.0), (1, 0.0), (1, 0.2)):
        run = prepared(*words.split(), "batch.micro=2", "rollout.batch_size=2")
        run.recipe.scorer = Scorer(Slow(seconds), ahead=ahead)
        module = run.fit()
        points = vars(module.buffer.points)
        tensors = {name: t for name, t in (points | points["frozen"]).items() if isinstance(t, Tensor)}
        stats = {name: value for name, value in module.stats.items() if name not in ("seconds", "images_per_s")}
        weights = {name: p.detach().clone() for name, p in module.live.trained().items()}
        found.append((tensors, weights, stats, run.trainer.callback_metrics))
        run.recipe.scorer.close()
    for others in found[1:]:
        for mine, other in zip(found[0], others, strict=True):
            assert list(mine) == list(other)
            assert all(torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(other[name])) for name in mine)
    assert found[0][2]["advantage_abs"] > 0


def test_frozen_copies_are_asked_before_the_last_score_is_there(prepared: Callable[..., Run]):
    """The reward waits for the first velocity of a frozen copy; in turn it would wait in vain."""
    run = prepared("algo=nft", "frozen.old.every=rollout", "frozen.old.decay.kind=1")
    reward = Slow()
    reward.open.clear()
    run.recipe.scorer = Scorer(reward, ahead=1)
    module, trainer = run.build()
    velocity, seen = module._velocity, []

    def opening(*args: Any) -> Tensor:
        seen.append(reward.open.is_set())
        reward.open.set()
        return velocity(*args)

    module._velocity = opening  # type: ignore[method-assign]
    trainer.fit(module)
    assert seen[0] is False
    assert module.buffer.points.advantage.isfinite().all()


class Failing(Slow):
    """One that raises instead."""

    def __call__(self, *args: Any) -> Tensor:
        super().__call__(*args)
        raise ValueError("the server is gone")


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_reward_that_fails_beside_frozen_copies_ends_the_run_in_its_sentence(
    prepared: Callable[..., Run], ahead: int
):
    run = prepared("algo=nft")
    run.recipe.scorer = Scorer(Failing(), ahead=ahead)
    with pytest.raises(RewardError, match="scoring 4 samples failed with ValueError: the server is gone"):
        run.fit()
    assert run.trainer.global_step == 0


def test_prompts_of_the_next_epoch_are_encoded_before_the_last_score_is_there(prepared: Callable[..., Run]):
    """The reward waits for them; nothing is encoded for an epoch that does not come."""
    run = prepared("algo=grpo", "trainer.max_epochs=2", "batch.prompts=2")
    reward, texts = Slow(), []
    reward.open.clear()
    run.recipe.scorer = Scorer(reward, ahead=1)
    encode = run.recipe.model.encode

    def watched(prompts: list[str], *rest: Any) -> Any:
        texts.extend(prompts)
        if len(texts) == 4:
            reward.open.set()
        return encode(prompts, *rest)

    run.recipe.model.encode = watched  # type: ignore[method-assign]
    run.fit()
    prompts = run.recipe.data["train"]
    assert texts == [prompts.prompts[i].text for epoch in (0, 1) for i in prompts.epoch(run.recipe.seed, epoch, 2)]


def test_what_frozen_copies_raise_leaves_no_score_waiting(prepared: Callable[..., Run], monkeypatch: Any):
    run = prepared("algo=nft")
    reward, made = Slow(), []
    reward.open.clear()
    run.recipe.scorer = Scorer(reward, ahead=1)
    monkeypatch.setattr("flowalign.module.ScoreQueue", lambda ahead: made.append(ScoreQueue(ahead)) or made[-1])
    module, trainer = run.build()

    def failing(*args: Any) -> Tensor:
        assert made[0].waiting
        raise KeyError("velocity")

    module._velocity = failing  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="velocity"):
        trainer.fit(module)
    assert not made[0].waiting
    reward.open.set()


# ------------------------------------------------------------ evaluation


def test_an_evaluation_says_what_it_could_not_score(prepared: Callable[..., Run]):
    run = prepared("evaluation.num_val=8")
    run.recipe.scorer = Scorer(Reward(lambda seen: seen == 1), held_out={"whole": Reward(lambda seen: False)})
    module, trainer = run.build()
    metrics = trainer.validate(module, verbose=False)[0]
    assert metrics["val/reward/not_scored"] == 1 / 8
    assert metrics["val/reward"] == pytest.approx(metrics["val/whole"], rel=0.2)
    assert "val/whole/not_scored" not in metrics


def test_an_evaluation_reports_every_measure_and_every_category(prepared: Callable[..., Run]):
    run = prepared("evaluation.num_val=8")
    module, trainer = run.build()
    metrics = trainer.validate(module, verbose=False)[0]
    tags = {p.metadata["tag"] for p in module.eval_prompts["val"]}
    assert len(tags) == 4
    for name in ("reward", "strict", "quality"):
        by_tag = [metrics[f"val/{name}/{tag}"] for tag in tags]
        assert metrics[f"val/{name}"] == pytest.approx(sum(by_tag) / 4, abs=1e-6)  # equal shares
    assert module.shown["val"].images.shape == (2, 3, 64, 64)


def test_a_category_may_be_any_value(prepared: Callable[..., Run]):
    run = prepared()
    run.recipe.scorer = Scorer(lambda media, prompts, metadata: media.flatten(1).mean(dim=1))
    module, trainer = run.build()
    module.eval_prompts["val"] = [Prompt(p.text, metadata={"tag": ["a", 1]}) for p in module.eval_prompts["val"]]
    metrics = trainer.validate(module, verbose=False)[0]
    assert metrics["val/reward/['a', 1]"] == metrics["val/reward"]


def test_pictures_beyond_the_set_are_made_and_count_nowhere(prepared: Callable[..., Run]):
    """A rank of several makes them where the set does not divide: all four of a set, and five more, in threes."""
    module, trainer = prepared("evaluation.sampling.batch_size=3").build()
    plain = trainer.validate(module, verbose=False)[0]
    module, trainer = prepared().build()
    module._positions = lambda stage: Positions(9, 3, 0, 1)  # type: ignore[method-assign]
    assert trainer.validate(module, verbose=False)[0] == pytest.approx(plain, abs=1e-5)  # batches are others
    assert module.counts["evaluation"] == 9 * 3


def test_an_evaluation_is_the_same_twice_and_in_batches_of_any_size(prepared: Callable[..., Run]):
    found = []
    for size in (4, 3):
        module, trainer = prepared(f"evaluation.sampling.batch_size={size}").build()
        found += [trainer.validate(module, verbose=False)[0] for _ in range(2)]
    for metrics in found[1:]:
        assert metrics == pytest.approx(found[0], abs=1e-4)


def test_the_average_is_judged_where_it_is_asked_for(prepared: Callable[..., Run]):
    run = prepared("evaluation.weights=ema", "optimizer.lr=0.05")
    module = run.fit()
    held = {name: p.detach().clone() for name, p in module.live.trained().items()}
    averaged = run.trainer.validate(module, verbose=False)[0]
    assert all(torch.equal(held[name], p) for name, p in module.live.trained().items())
    module.live.copy_into_live("ema")
    run.recipe.evaluation = replace(run.recipe.evaluation, weights="live")
    assert run.trainer.validate(module, verbose=False)[0] == pytest.approx(averaged, abs=1e-6)


# ------------------------------------------------------------ text encoders


def test_letting_the_text_encoders_go_changes_no_number(prepared: Callable[..., Run], tmp_path: Path):
    few = ("data.train.limit=8", "trainer.max_epochs=2", "optimizer.lr=0.01")
    kept = prepared("algo=nft", *few)
    kept.fit()
    for _ in range(2):  # the second finds all on disk
        released = prepared("algo=nft", *few, "encoding.release=true", f"encoding.cache={tmp_path / 'prompts'}")
        module = released.fit()
        assert released.recipe.model.text_encoders() == {}
        for name, parameter in module.live.trained().items():
            assert torch.equal(parameter, kept.module.live.trained()[name]), name
    with pytest.raises(RuntimeError, match=r"'something new' cannot be encoded: the text encoders were released"):
        released.recipe.model.encode(["something new"])


@pytest.mark.parametrize("folders", [("one", "one"), ("one", "other")])
def test_ranks_divide_the_encoding_for_a_folder_that_all_of_them_see(
    prepared: Callable[..., Run], tmp_path: Path, folders: tuple[str, str]
):
    gate, asked = threading.Barrier(2), ([], [])
    words = ("algo=nft", "data.train.limit=8", "encoding.release=true")
    modules = [prepared(*words, f"encoding.cache={tmp_path / name}").build()[0] for name in folders]

    def encode_all(rank: int) -> None:
        module, encode = modules[rank], modules[rank].recipe.model.encode
        strategy = SimpleNamespace(root_device=torch.device("cpu"), barrier=lambda name: gate.wait(60))
        module.trainer = SimpleNamespace(strategy=strategy, world_size=2, global_rank=rank)  # type: ignore[assignment]

        def noted(texts: list[str], *others: Any) -> Any:
            asked[rank].extend(texts)
            return encode(texts, *others)

        module.recipe.model.encode = noted  # type: ignore[method-assign]
        module._encode_all()

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(encode_all, range(2)))
    trained = {p.text for p in modules[0].recipe.data["train"].prompts}
    evaluated = {p.text for prompts in modules[0].eval_prompts.values() for p in prompts}
    for module in modules:  # their encoders are gone
        module.conditioner.prepare(module.recipe.data["train"].prompts, module.recipe.train_size.area)
    if folders == ("one", "one"):
        assert {*asked[0], *asked[1]} == trained | evaluated
        assert [len(trained.intersection(texts)) for texts in asked] == [4, 4]
        assert not trained.intersection(asked[0], asked[1])
    else:
        assert {*asked[0]} == {*asked[1]} == trained | evaluated
