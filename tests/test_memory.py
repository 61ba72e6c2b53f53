"""The memory plan counts what is there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d

from flowalign.alive import PeakMemory
from flowalign.checks import ConfigError
from flowalign.compatibility import check_groups
from flowalign.decoding import DecodingMemory, decoding_bytes
from flowalign.memory import PlanLine, advice, pass_bytes, plan, saved_for_backward, storage_bytes
from flowalign.models.sd3 import SD3
from flowalign.module import AlignModule
from flowalign.policy import Policy
from flowalign.recipe import batch_plan
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.running import Running

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig


@pytest.fixture
def sd3(sd3_folder: Path) -> SD3:
    model = SD3(str(sd3_folder), max_sequence_length=4)
    model.pipe.transformer.requires_grad_(True)
    return model


def kept(model: SD3, rows: int, guidance: float = 1.0) -> int:
    cond = model.encode(["a circle"], [""]).repeat_interleave(rows)
    return saved_for_backward(model, torch.zeros(rows, *model.latent_shape(32, 32)), cond, guidance)


def test_what_is_kept_for_backward_grows_with_the_rows(sd3: SD3):
    one, two, four = (kept(sd3, rows) for rows in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    assert four == pytest.approx(4 * one, rel=0.1)  # a little does not depend on the rows
    assert kept(sd3, 1, guidance=3.0) == pytest.approx(two, rel=0.02)  # both branches


def test_checkpointing_keeps_less_and_changes_no_gradient(sd3: SD3):
    cond, x = sd3.encode(["a circle"]), torch.ones(1, *sd3.latent_shape(32, 32))

    def gradient() -> torch.Tensor:
        sd3.pipe.transformer.zero_grad()
        sd3.velocity(x, 0.5, cond).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in sd3.pipe.transformer.parameters() if p.grad is not None])

    before, all_of_it = kept(sd3, 4), gradient()
    Running(gradient_checkpointing=True).apply(sd3)
    assert kept(sd3, 4) < 0.5 * before
    assert torch.allclose(gradient(), all_of_it, rtol=1e-4, atol=1e-6)


def test_a_family_that_checkpointing_changes_is_refused(sd3: SD3):
    sd3.checkpointing_is_exact = False  # type: ignore[misc]
    with pytest.raises(ValueError, match="use running.gradient_checkpointing=false"):
        Running(gradient_checkpointing=True).apply(sd3)


def test_a_command_is_refused_such_a_family_before_it_is_loaded(compose: Callable[..., DictConfig]):
    words = ("model=chroma", "tune=lora")
    check_groups(compose(*words))
    with pytest.raises(ConfigError, match=r"^Chroma predicts .* use running.gradient_checkpointing=false\.$"):
        check_groups(compose(*words, "running.gradient_checkpointing=true"))


def test_channels_last_decode_the_same_pictures(tiny: Callable[..., DictConfig]):
    model = build_recipe(tiny()).model
    x = torch.randn(3, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    before = model.decode(x)
    Running(vae_channels_last=True).apply(model)
    convolutions = [part.weight for part in model.pipe.vae.modules() if isinstance(part, torch.nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    after = model.to(torch.device("cpu")).decode(x)
    assert before.std() > 0.1
    assert torch.allclose(before, after, atol=1e-4)
    assert after.is_contiguous()  # as rewards know them
    assert torch.allclose(model.encode_images(before), model.encode_images(after), atol=1e-3)


@pytest.mark.parametrize("model", ["wan2_1_t2v", "qwen_image"])
def test_channels_last_are_refused_where_convolutions_have_three_dimensions(
    compose: Callable[..., DictConfig], model: str
):
    """Before the model is loaded."""
    with pytest.raises(ConfigError, match="3-d convolutions, .* use running.vae_channels_last=false"):
        check_groups(compose(f"model={model}", "tune=lora", "running.vae_channels_last=true"))


def test_storages_are_counted_once():
    t = torch.zeros(10)
    assert storage_bytes([t, t[2:], t.view(2, 5), torch.zeros(1)]) == 44


@pytest.mark.parametrize(("tune", "copies"), [("full", 2), ("lora", 2)])
def test_the_plan_of_a_run_adds_up(tiny: Callable[..., DictConfig], tune: str, copies: int):
    cfg = tiny("algo=nft", f"tune={tune}", "algo.kl_beta=0.1", "trainer.check_val_every_n_epoch=9")
    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    lines = {line.name: line.size for line in module.memory_plan()}
    trained = 4 * sum(p.numel() for p in module.live.trained().values())
    assert lines["gradients"] == trained
    assert lines["optimiser's state"] == 2 * trained
    assert lines[f"{copies} frozen copies"] == copies * trained
    state = trainer.optimizers[0].state_dict()["state"].values()
    assert lines["optimiser's state"] == pytest.approx(
        sum(4 * t.numel() for entry in state for t in entry.values()), rel=0.001
    )
    points = module.buffer.points
    real = storage_bytes([points.x, points.x0, points.eps, *points.frozen.values()])  # type: ignore[list-item]
    assert lines["12 training points"] == pytest.approx(real, rel=0.01)
    assert lines["denoisers"] == sum(4 * p.numel() for p in recipe.model.pipe.transformer.parameters()) + sum(
        b.numel() * b.element_size() for b in recipe.model.pipe.transformer.buffers()
    )
    freed = build_recipe(tiny("algo=nft", "encoding.release=true", "policy.device_of_frozen=cpu"))
    freed.tune, freed.model = recipe.tune, recipe.model
    names = {line.name for line in plan(freed, module.live, module.geometry, module.conditioner(
        recipe.data["train"].prompts[:1], torch.device("cpu"), recipe.train_size.area
    ), nullcontext)}  # fmt: skip
    assert not any("copies" in name or "text" in name for name in names)


# ------------------------------------------------------------ insides


def test_what_is_alive_at_once_is_counted_and_nothing_twice():
    known = torch.zeros(100)
    with PeakMemory([known]) as alive:
        a = known + 1
        b = a.view(10, 10)[2:] * 2
        del a
        c = torch.zeros(5)
        assert alive.now == 4 * (80 + 5)
        del b, c
        known.view(10, 10)
    assert (alive.now, alive.peak) == (0, 4 * 180)


@pytest.mark.parametrize("running", [Running(), Running(vae_slicing=True), Running(vae_tiling=True)], ids=str)
def test_a_decoding_takes_what_is_planned(sd3: SD3, running: Running):
    if running.vae_tiling:
        sd3.pipe.vae.tile_sample_min_size, sd3.pipe.vae.tile_latent_min_size = 16, 8
    whole = decoding_bytes(sd3, sd3.latent_shape(64, 64), 3, torch.device("cpu"))
    running.apply(sd3)
    x = torch.zeros(3, *sd3.latent_shape(64, 64))
    planned = decoding_bytes(sd3, tuple(x.shape[1:]), 3, torch.device("cpu"))
    with PeakMemory([x, *sd3.pipe.vae.parameters()]) as alive:
        sd3.decode(x)
    assert planned == alive.peak
    assert whole is not None
    assert planned is not None
    assert planned == whole if running == Running() else planned < 0.7 * whole


def test_a_decoding_that_depends_on_values_is_not_planned(sd3: SD3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SD3, "denormalised", lambda self, x: x if x.sum() > 0 else -x)
    assert decoding_bytes(sd3, sd3.latent_shape(32, 32), 1, torch.device("cpu")) is None


@pytest.mark.parametrize("last", [False, True])
def test_convolutions_in_16_bits_on_cuda_copy_unless_channels_are_last(last: bool):
    form = torch.channels_last if last else torch.contiguous_format
    with FakeTensorMode():
        x = torch.empty(2, 8, 16, 16, dtype=torch.bfloat16, device="cuda", memory_format=form)
        weight = torch.empty(4, 8, 3, 3, dtype=torch.bfloat16, device="cuda", memory_format=form)
        with DecodingMemory([x, weight]) as alive, torch.no_grad():
            y = conv2d(x, weight, padding=1)
    result = 1 if y.is_contiguous(memory_format=form) and last else 2  # which only CUDA lays out like its input
    assert alive.peak == result * y.nbytes + (0 if last else x.nbytes)


MIXED = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)  # as the Trainer does it


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_every_row_of_a_pass_takes_the_same_beside_what_is_fixed(tiny: Callable[..., DictConfig], tune: str):
    r = build_recipe(tiny(f"tune={tune}"))
    policy = Policy(r.model.denoisers(), r.tune, r.model.lora_targets, [])
    cond = r.model.encode(["a circle"])
    one, two, four = (pass_bytes(r, cond, MIXED, rows) for rows in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    copies = 2 * sum(p.numel() for p in r.model.pipe.transformer.parameters())
    fixed = 2 * one - two  # weights in 16 bits; adapters leave out those that no gradient comes through
    assert fixed == pytest.approx(copies, rel=0.1) if tune == "full" else 0.5 * copies < fixed < 0.7 * copies
    before = [p.grad for p in policy.trained().values()]
    assert before == [None] * len(before)


def test_a_pass_that_depends_on_values_is_told_by_what_it_keeps(
    tiny: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """And the plan says so, and the log why."""
    r = build_recipe(tiny("tune=full"))
    policy = Policy(r.model.denoisers(), r.tune, r.model.lora_targets, [])
    cond = r.model.encode(["a circle"])
    inside = [pass_bytes(r, cond, MIXED, rows) for rows in (1, 4)]
    forward = SD3.forward
    monkeypatch.setattr(SD3, "forward", lambda *given: forward(*given) if given[1].isfinite().all() else 0)
    kept = [pass_bytes(r, cond, MIXED, rows) for rows in (1, 4)]
    assert all(0.8 * most < least < most for most, least in zip(inside, kept, strict=True))
    with caplog.at_level("DEBUG", logger="flowalign.memory"):
        names = [line.name for line in plan(r, policy, batch_plan(r), cond, MIXED)]
    assert "kept for the backward pass of 3 points" in names
    assert "isfinite" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("updates", [1, 2])
def test_optimiser_steps_take_what_is_planned(
    tiny: Callable[..., DictConfig], tune: str, checkpointing: bool, updates: int
):
    """Two micro-batches a step, or one."""
    cfg = tiny(
        "algo=nft", f"tune={tune}", "trainer.precision=bf16-mixed", "trainer.check_val_every_n_epoch=9",
        f"running.gradient_checkpointing={checkpointing}", f"batch.updates={updates}", "batch.micro=6",
        "batch.passes=2",  # the first step makes the moments
    )  # fmt: skip
    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    seen: list[PeakMemory] = []

    def begin(*_: object) -> None:
        if not seen:
            module._ensure_rollout()
            seen.append(PeakMemory([*module.parameters(), *module.buffers()]))
            seen[0].__enter__()

    watch = LambdaCallback(on_train_batch_start=begin, on_train_end=lambda *_: seen[0].__exit__(None, None, None))
    trainer.callbacks.append(watch)  # type: ignore[attr-defined]
    trainer.fit(module)
    lines = {line.name: line.size for line in module.memory_plan()}
    names = ("gradients", "optimiser's state", "forward and backward of 6 points")
    planned = sum(lines[name] for name in names)
    assert seen[0].peak == pytest.approx(planned, rel=0.1)
    assert all(p.grad is None for p in module.live.trained().values())  # a rollout and an evaluation have the room


def test_advice_names_the_largest_first_and_only_if_needed():
    lines = [PlanLine("small", 1 * 2**30, "a=1"), PlanLine("large", 5 * 2**30, "b=2"), PlanLine("fixed", 9 * 2**30)]
    assert advice(lines, 20 * 2**30) == []
    assert advice(lines, 10 * 2**30) == ["b=2  (large: 5.00 GiB)", "a=1  (small: 1.00 GiB)"]
