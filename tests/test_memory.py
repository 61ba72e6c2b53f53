"""The memory plan counts what is there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch

from flowalign.memory import Share, advice, held, kept_for_backward, plan
from flowalign.models.sd3 import SD3
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.running import Running
from tests.models.tiny.parts import wan_vae

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
    return kept_for_backward(model, torch.zeros(rows, *model.latent_shape(32, 32)), cond, guidance)


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


def test_channels_last_are_refused_where_convolutions_have_three_dimensions(sd3: SD3):
    sd3.pipe.register_modules(vae=wan_vae())
    with pytest.raises(ValueError, match="3-d convolutions, .* use running.vae_channels_last=false"):
        Running(vae_channels_last=True).apply(sd3)


def test_storages_are_counted_once():
    t = torch.zeros(10)
    assert held([t, t[2:], t.view(2, 5), torch.zeros(1)]) == 44


@pytest.mark.parametrize(("tune", "copies"), [("full", 2), ("lora", 2)])
def test_the_plan_of_a_run_adds_up(tiny: Callable[..., DictConfig], tune: str, copies: int):
    from flowalign.module import AlignModule

    cfg = tiny("algo=nft", f"tune={tune}", "algo.kl_beta=0.1", "trainer.check_val_every_n_epoch=9")
    recipe = build_recipe(cfg)
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    lines = {line.name: line.size for line in module.memory_plan()}
    trained = 4 * sum(p.numel() for p in module.live.trained().values())
    assert lines["gradients"] == trained
    assert lines["optimiser: two moments"] == 2 * trained
    assert lines[f"{copies} frozen copies"] == copies * trained
    state = trainer.optimizers[0].state_dict()["state"].values()
    assert lines["optimiser: two moments"] == pytest.approx(
        sum(4 * t.numel() for entry in state for t in entry.values()), rel=0.001
    )
    points = module.buffer.points
    real = held([points.x, points.x0, points.eps, *points.frozen.values()])  # type: ignore[list-item]
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


def test_advice_names_the_largest_first_and_only_if_needed():
    lines = [Share("small", 1 * 2**30, "a=1"), Share("large", 5 * 2**30, "b=2"), Share("fixed", 9 * 2**30)]
    assert advice(lines, 20 * 2**30) == []
    assert advice(lines, 10 * 2**30) == ["b=2  (large: 5.00 GiB)", "a=1  (small: 1.00 GiB)"]
