"""What is asked of the network less often, or more cheaply, leaves every number as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from flowalign.algorithms.decay import Decay
from flowalign.checks import ConfigError, check_signatures
from flowalign.compiling import COMPILE_OPTIONS
from flowalign.module import AlignModule
from flowalign.points import subsample_weights
from flowalign.policy.follow import Average, Follow
from flowalign.recipe import Recipe
from flowalign.run import build_recipe, build_trainer, compose_config, plan_accumulation
from flowalign.running import Running
from flowalign.types import required

if TYPE_CHECKING:
    from omegaconf import DictConfig

Fit = Callable[..., AlignModule]


@pytest.fixture
def fit(tiny: Callable[..., DictConfig]) -> Fit:
    """A short run of some overrides; `metrics` are those of its epoch."""

    def run(*overrides: str) -> AlignModule:
        cfg = tiny("trainer.check_val_every_n_epoch=99", "optimizer.lr=0.01", "optimizer.eps=1e-3", *overrides)
        recipe = build_recipe(cfg)
        module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
        trainer.fit(module)
        module.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}  # type: ignore
        return module

    return run


def apart(one: AlignModule, other: AlignModule) -> float:
    """The largest difference of what was trained."""
    theirs = other.live.trained()
    return max(float((p - theirs[name]).detach().abs().max()) for name, p in one.live.trained().items())


# ------------------------------------------------------------ the old policy is the live one


@pytest.mark.parametrize(
    ("rule", "steps", "expected"),
    [
        (Follow(Decay(0), "rollout"), 1, True),
        (Follow(Decay(0), "rollout"), 2, False),  # a snapshot from the second step on
        (Follow(Decay(0), "step"), 2, True),
        (Follow(Decay(2), "step"), 1, False),  # 0 for 75 steps only
        (Follow(Decay([0, 0.1, 0.5]), "rollout"), 1, False),
        (Follow(Average(), "step"), 1, False),
        (Follow(Average(), "always"), 5, True),
    ],
)
def test_a_copy_stays_live_where_it_takes_over_at_every_step(rule: Follow, steps: int, expected: bool):
    assert rule.stays_live(steps) is expected


@pytest.mark.parametrize(
    "algo",
    [
        ("algo=nft",),
        pytest.param(("algo=flowawr",), marks=pytest.mark.slow),
        pytest.param(("algo=awm", "algo.off_policy=true", "algo.ema_beta=0"), marks=pytest.mark.slow),
    ],
)
def test_the_live_velocity_serves_as_the_old_one(fit: Fit, monkeypatch: pytest.MonkeyPatch, algo: tuple[str, ...]):
    words = (*algo, "frozen.old.decay.kind=0", "batch.updates=1", "running.merge_adapters=false")
    cheap = fit(*words)
    assert cheap.counts["frozen"] == 0
    assert not cheap.live.copies
    monkeypatch.setattr(Recipe, "same_as_live", frozenset())
    plain = fit(*words)
    assert plain.counts["frozen"] == 4 * 3
    assert set(plain.live.copies) == {"old"}
    assert apart(cheap, plain) < 1e-6
    assert {n: v for n, v in cheap.metrics.items() if n.startswith("train/")} == pytest.approx(
        {n: v for n, v in plain.metrics.items() if n.startswith("train/")}, abs=1e-5
    )


def test_on_policy_by_choice_the_old_policy_is_the_live_one_at_every_step(fit: Fit):
    """In two updates of a rollout a snapshot would have been left behind."""
    assert fit("algo=nft", "frozen.old.every=always").metrics["train/v_drift"] == 0
    assert fit("algo=nft", "frozen.old.decay.kind=0").metrics["train/v_drift"] > 0


def test_the_settings_pass_the_check_of_a_command_line():
    assert (
        compose_config("algo=nft", "frozen.old.every=always", "optimisation.kl_share=0.5").frozen.old.every == "always"
    )


def test_an_average_that_is_the_live_weights_is_refused(fit: Fit):
    with pytest.raises(ValueError, match=r"frozen.ema.every=always is no average: use evaluation.weights=live"):
        fit("algo=nft", "evaluation.weights=ema", "frozen.ema.every=always")
    with pytest.raises(ConfigError, match=r"frozen.ema.every=always is no average"):  # before anything is loaded
        compose_config("algo=nft", "evaluation.weights=ema", "frozen.ema.every=always")


# ------------------------------------------------------------ merged adapters


@pytest.mark.parametrize(
    "algo",
    [
        ("algo=grpo", "dynamics=cps"),  # whose clip range is the narrowest
        pytest.param(("algo=grpo",), marks=pytest.mark.slow),
        pytest.param(("algo=nft", "algo.kl_beta=0.01"), marks=pytest.mark.slow),
    ],
)
def test_merged_adapters_train_what_adapters_apart_train(fit: Fit, algo: tuple[str, ...]):
    together, separate = (fit(*algo, "trainer.max_epochs=2", f"running.merge_adapters={m}") for m in ("true", "false"))
    assert together.live.merge
    assert not separate.live.merge
    assert 0 < apart(together, separate) < 1e-5
    if "algo=grpo" in algo:  # on policy but for rounding, far below any clip range
        assert together.metrics["train/on_policy_gap"] < 1e-6


# ------------------------------------------------------------ guidance


def test_the_gradient_through_one_branch_is_that_of_a_detached_one(tiny: Callable[..., DictConfig]):
    model = build_recipe(tiny("algo=nft")).model
    cond = model.encode(["two red circles", "a blue square"], ["", ""])
    x = torch.randn(2, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    weight = next(iter(model.denoisers().values())).requires_grad_(True)
    p = next(p for name, p in weight.named_parameters() if name.endswith("to_q.weight"))

    def gradient(v: Tensor) -> Tensor:
        return torch.autograd.grad(v.square().mean(), p)[0]

    one, both = model.velocity(x, 0.5, cond, 3.0, through_both=False), model.velocity(x, 0.5, cond, 3.0)
    positive = model.velocity(x, 0.5, cond)
    with torch.no_grad():
        negative = model.velocity(x, 0.5, type(cond)({k.removeprefix("neg."): cond[k] for k in cond if "neg." in k}))
    assert torch.allclose(one, both, atol=1e-5)
    expected = gradient(negative + 3.0 * (positive - negative))
    assert torch.allclose(gradient(one), expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(gradient(both), expected, rtol=0.01)


def test_a_rollout_asks_both_branches_at_once_and_training_one_after_the_other(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
):
    from flowalign.models.sd3 import SD3

    asked: dict[bool, list[int]] = {True: [], False: []}
    forward = SD3.forward

    def counted(self: SD3, x: Tensor, t: Tensor, branch: Any) -> Tensor:
        asked[torch.is_grad_enabled()].append(len(x))
        return forward(self, x, t, branch)

    monkeypatch.setattr(SD3, "forward", counted)
    words = ("algo=grpo", "rollout.same_noise=false", "steps=all", "rollout.guidance=3")
    fit(*words, "optimisation.cfg_gradient=conditional")
    assert asked == {True: [3] * 4, False: [8] * 4 + [3] * 4}  # four pictures in four steps, four micro-batches of 3
    asked[True].clear()
    fit(*words)
    assert asked[True] == [6] * 4


# ------------------------------------------------------------ a penalty at some of the points


def test_a_share_of_the_points_is_drawn_evenly_and_weighs_what_all_would():
    sample = torch.tensor([5, 8, 2]).repeat_interleave(9)
    drawings = torch.stack([subsample_weights(0, epoch, sample, 1 / 3) for epoch in range(600)])
    assert torch.equal(drawings[4], subsample_weights(0, 4, sample, 1 / 3))
    assert (drawings.unflatten(1, (3, 9)).count_nonzero(dim=2) == 3).all()  # of every sample
    assert drawings.unique().tolist() == [0, 3]
    assert (drawings.mean(dim=0) - 1).abs().max() < 5 * (2 / 600) ** 0.5  # variance of 3 with probability 1/3
    assert len(drawings.unflatten(1, (3, 9))[0].unique(dim=0)) > 1  # samples differ
    others = subsample_weights(0, 4, sample[9:], 1 / 3)
    assert torch.equal(drawings[4][9:], others)  # whoever else is on the rank


def test_the_expectation_over_the_draws_is_the_penalty_at_every_point():
    """Drawn once each, the nine points of a sample weigh what they weigh together."""
    penalty = torch.rand(27, generator=torch.Generator().manual_seed(0))
    sample = torch.arange(3).repeat_interleave(9)
    means = torch.stack([(subsample_weights(1, epoch, sample, 1 / 3) * penalty).mean() for epoch in range(2000)])
    assert means.mean() == pytest.approx(float(penalty.mean()), abs=5 * float(means.std()) / 2000**0.5)


def test_the_reference_is_asked_for_the_drawn_points_only(fit: Fit):
    words = ("algo=grpo", "steps=all", "algo.kl_beta=0.1", "batch.updates=1")
    some, every = fit(*words, "optimisation.kl_share=0.34"), fit(*words)
    assert (some.counts["frozen"], every.counts["frozen"]) == (4, 12)
    points = some.buffer.points
    assert points.kl_weight is not None
    asked = points.kl_weight > 0
    assert torch.allclose(points.frozen["reference"][asked], every.buffer.points.frozen["reference"][asked], atol=1e-5)
    assert every.buffer.points.kl_weight is None


def test_a_reference_in_the_formula_is_asked_at_every_point(fit: Fit):
    module = fit("algo=dpo", "batch.group_size=4", "batch.micro=6", "optimisation.kl_share=0.34")
    assert module.counts["frozen"] == len(module.buffer.points.x)
    assert module.buffer.points.kl_weight is None


def test_a_share_of_nothing_is_refused(tiny: Callable[..., DictConfig]):
    with pytest.raises(ValueError, match=r"kl_share is a share of the points, in \(0, 1\] \(got 0"):
        build_recipe(tiny("optimisation.kl_share=0"))


# ------------------------------------------------------------ points without an advantage


def test_points_without_an_advantage_are_left_out_of_the_forward_and_not_of_the_mean(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
):
    """One of two groups is all alike; the other one's gradient is that of the full batch."""
    from flowalign.rewards.shapes import Shapes

    monkeypatch.setattr(Shapes, "__call__", lambda self, media, *_: torch.tensor([0.5, 0.5, 0.0, 1.0]))
    words = ("algo=grpo", "steps=all", "batch.updates=1", "credit=group_std")
    some, every = fit(*words, "optimisation.skip_zero=true"), fit(*words)
    assert (some.buffer.points.advantage.reshape(4, 3) == 0).all(dim=1).tolist() == [True, True, False, False]
    assert every.counts["train"] == 12
    assert 6 <= some.counts["train"] < 12
    assert apart(some, every) < 1e-6
    assert some.metrics["train/loss"] == pytest.approx(every.metrics["train/loss"], abs=1e-6)


def test_the_loss_is_logged_as_the_mean_over_skipped_points_too(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    """Micro-batches of which one, three or no points are left; their losses do not add up to 0."""
    from flowalign.rewards.shapes import Shapes

    monkeypatch.setattr(Shapes, "__call__", lambda self, media, *_: torch.tensor([0.2, 0.5, 0.0, 1.0]))
    words = ("algo=grpo", "steps=all", "batch.updates=1", "credit=best")
    some, every = fit(*words, "optimisation.skip_zero=true"), fit(*words)
    assert some.counts["train"] < every.counts["train"]
    assert every.metrics["train/loss"] == pytest.approx(-0.5, abs=1e-4)
    assert some.metrics["train/loss"] == pytest.approx(every.metrics["train/loss"], abs=1e-6)


def test_with_a_penalty_every_point_is_seen(fit: Fit):
    module = fit("algo=grpo", "algo.kl_beta=0.1", "optimisation.skip_zero=true", "reward=brightness")
    assert not module.recipe.algorithm.silent_at_zero
    assert module.counts["train"] == len(module.buffer.points.x)


# ------------------------------------------------------------ a fused optimiser


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_fused_step_is_that_of_the_loop(fit: Fit, precision: str):
    """With a norm that clips, which Lightning refuses in 16 bits where a step would unscale gradients itself."""
    words = ("algo=nft", f"trainer.precision={precision}", "trainer.gradient_clip_val=0.01")
    fused, loop = (fit(*words, f"optimizer.fused={value}") for value in ("true", "false"))
    assert fused.trainer.optimizers[0].param_groups[0]["fused"] is True
    assert 0.01 < fused.metrics["train/grad_norm"] == pytest.approx(loop.metrics["train/grad_norm"], rel=1e-3)  # type: ignore
    assert apart(fused, loop) < 1e-6


def test_a_default_that_another_optimiser_does_not_know_is_refused_with_the_way_out(tiny: Callable[..., DictConfig]):
    words = ["optimizer._target_=torch.optim.Adamax"]
    with pytest.raises(
        ConfigError, match=r"^optimizer\.fused: Adamax has no parameter fused; .*; ~optimizer\.fused removes it"
    ):
        check_signatures(tiny(*words))
    check_signatures(tiny(*words, "~optimizer.fused"))


# ------------------------------------------------------------ states in 16 bits


@pytest.mark.parametrize(
    ("algo", "keep_in"),
    [
        (("algo=grpo", "dynamics=cps"), "bfloat16"),
        pytest.param(("algo=grpo_guard", "algo.kl_beta=0.1"), "bfloat16", marks=pytest.mark.slow),
        pytest.param(("algo=grpo",), "float16", marks=pytest.mark.slow),
    ],
)
def test_states_kept_in_16_bits_take_half_and_are_on_policy(fit: Fit, algo: tuple[str, ...], keep_in: str):
    words = (*algo, "running.merge_adapters=false")
    short, full = fit(*words, f"rollout.keep_in={keep_in}"), fit(*words)
    assert short.metrics["train/on_policy_gap"] < 1e-6
    bytes_of = [p.x.nbytes + required(p.x_next, "x_next").nbytes for p in (short.buffer.points, full.buffer.points)]
    assert 2 * bytes_of[0] == bytes_of[1]
    assert all(v.dtype == torch.float32 for v in short.buffer.points.frozen.values())
    points = f"{len(full.buffer.points.x)} training points"
    planned = [{line.name: line.size for line in module.memory_plan()}[points] for module in (short, full)]
    assert planned[1] - planned[0] == bytes_of[1] - bytes_of[0]
    assert apart(short, full) > 0


def test_a_type_of_states_is_refused_where_it_is_none_or_nothing_is_recorded():
    with pytest.raises(ValueError, match=r"rollout.keep_in: expected one of .* did you mean bfloat16"):
        compose_config("algo=grpo", "rollout.keep_in=bfloat61")
    with pytest.raises(ValueError, match=r"algo=nft records none: use rollout.keep_in=float32, or algo=grpo"):
        compose_config("rollout.keep_in=bfloat16")


# ------------------------------------------------------------ compiled blocks


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_compilers_options_are_known_to_it():
    """A release of PyTorch may drop one; it would then refuse the first batch."""
    from torch._inductor import config

    assert COMPILE_OPTIONS.keys() <= config.get_config_copy().keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_tanh_and_gelu_are_within_rounding_of_the_true_ones():
    """Down to where they vanish and up to where they are flat, with gradients; errors in units of 2^-23."""
    x = torch.cat([torch.linspace(-20, 20, 100_001), torch.tensor([-1e4, -1e-6, 0.0, 1e-6, 1e4])]).requires_grad_()
    functions: list[Callable[[Tensor], Tensor]] = [torch.tanh, partial(gelu, approximate="tanh")]
    for f in functions:
        exact = x.detach().double().requires_grad_()
        found, true = torch.compile(f, options=COMPILE_OPTIONS)(x), f(exact)
        slopes = [torch.autograd.grad(y.sum(), at)[0] for y, at in ((found, x), (true, exact))]
        assert ((found - true).abs() <= 4 * 2**-23 * (1 + x.abs())).all()
        assert ((slopes[0] - slopes[1]).abs() <= 16 * 2**-23 * (1 + x.abs())).all()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes minutes where others work too
@pytest.mark.parametrize(
    "words",
    [
        ("algo=grpo", "tune=lora"),
        ("algo=grpo", "tune=full", "optimizer.lr=1e-4"),
        ("algo=nft", "tune=lora"),
        ("algo=nft", "tune=full", "optimizer.lr=1e-4"),
        ("algo=nft", "tune=lora", "model.quantised=int8"),
        ("algo=nft", "tune=lora", "model.quantised=nf4"),
    ],
)
def test_compiled_blocks_train_what_blocks_train(fit: Fit, words: tuple[str, ...]):
    """On points of two rollouts, of which the second is by trained weights."""
    if words[-1].startswith("model.quantised"):
        pytest.importorskip("torchao")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        # With an evaluation there are more kinds of calls than the compiler takes by itself.
        words = (*words, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1")
        compiled, plain = (fit(*words, f"running.compile={c}") for c in ("true", "false"))
    assert 0 < apart(compiled, plain) < 1e-5
    if "algo=grpo" in words:
        assert compiled.metrics["train/on_policy_gap"] < 1e-5
    assert compiled.metrics["train/grad_norm"] == pytest.approx(plain.metrics["train/grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes minutes where others work too
def test_compiled_blocks_predict_the_same_and_are_compiled_once(tiny: Callable[..., DictConfig]):
    """Rollout, frozen copies and training of two epochs, with adapters merged, exchanged and apart."""
    from lightning import Callback
    from torch._dynamo.utils import counters

    graphs: list[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    trained = []
    for compiled in ("false", "true"):
        counters.clear()
        graphs.clear()
        cfg = tiny(
            "algo=nft", "algo.kl_beta=0.01", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=99",
            "optimizer.eps=1e-3", f"running.compile={compiled}",
        )  # fmt: skip
        recipe = build_recipe(cfg)
        module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
        trainer.callbacks.append(Count())  # type: ignore
        trainer.fit(module)
        trained.append(module)
    assert 0 < graphs[0] == graphs[1] == graphs[2]
    assert apart(*trained) < 1e-5
    assert trained[0].state_dict().keys() == trained[1].state_dict().keys()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiling takes minutes where others work too
def test_compiled_code_does_not_depend_on_the_sizes_that_came_before(
    tiny: Callable[..., DictConfig], two_threads: None
):
    """A continued run meets other sizes first. Code for any size shares the sums over rows otherwise among threads."""
    recipe = build_recipe(tiny())
    transformer = recipe.model.pipe.transformer
    del transformer.requires_grad_().transformer_blocks[1:-1]
    Running(compile=True).apply(recipe.model)
    cond = recipe.model.encode(["a circle"])

    def gradient(rows: int) -> Tensor:
        noise = torch.randn(rows, *recipe.model.latent_shape(64, 64), generator=torch.Generator().manual_seed(rows))
        transformer.zero_grad()
        recipe.model.velocity(noise, 0.5, cond.repeat_interleave(rows)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])

    found = []
    for before in ([], [2, 3]):
        torch._dynamo.reset()
        for rows in before:
            gradient(rows)
        found.append(gradient(72))
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_blocks_of_several_kinds_are_compiled_for_every_batch(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Beyond its limit of versions of one function, the compiler runs it uncompiled; here it raises instead."""
    from tests.models.tiny import sd3

    monkeypatch.setattr(sd3, "TRANSFORMER", sd3.TRANSFORMER | {"num_layers": 4, "dual_attention_layers": (0, 1)})
    sd3.build().save_pretrained(tmp_path / "pipeline")
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_with(self, backend="eager"))
    words = (
        "algo=nft", "algo.kl_beta=0.01", "tune=lora", "batch.group_size=3", "rollout.batch_size=4",
        "trainer.max_epochs=1", f"model.pretrained={tmp_path / 'pipeline'}", "model.absent=[]", "running.compile=true",
    )  # fmt: skip
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        fit(*words)
