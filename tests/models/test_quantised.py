"""A base in 8 or 4 bits under adapters: nearly the same network, a fraction of the memory, and unchanged training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from torch import Tensor, nn

from flowalign.checks import ConfigError
from flowalign.compatibility import check_groups
from flowalign.memory import saved_for_backward, weight_bytes
from flowalign.models.quantised import SUPERBLOCK, Kind, QuantisedLinear, is_quantised, quantise, weight_quantiser
from flowalign.models.sd3 import SD3
from flowalign.policy import Lora, Policy
from flowalign.policy.fingerprint import weights_fingerprint
from flowalign.running import Running
from tests.conftest import ROOT
from tests.test_commands import picture, plain_pipeline

if TYPE_CHECKING:
    from omegaconf import DictConfig

KINDS = get_args(Kind)
PARTS = {"absent": ("text_encoder_3", "tokenizer_3"), "max_sequence_length": 1}


def tiny_sd3(kind: Any = None) -> SD3:
    return SD3("tiny_sd3", quantised=kind, **PARTS)


@pytest.fixture(autouse=True)
def _needs_torchao(request: pytest.FixtureRequest) -> None:
    if "absent" not in request.node.name:
        pytest.importorskip("torchao")


@pytest.fixture
def asked() -> Callable[[SD3], Tensor]:
    """The velocity of four states at four noise levels, with gradients for trained parameters."""

    def ask(model: SD3) -> Tensor:
        cond = model.encode(["two red circles", "a blue square"]).repeat_interleave(2)
        x = torch.randn(4, *model.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
        return model.velocity(x, torch.tensor([0.9, 0.7, 0.4, 0.1]), cond)

    return ask


def with_adapters(model: SD3) -> SD3:
    """Add adapters with nonzero weights, so that they change the output."""
    Lora(rank=4, alpha=8)(model.pipe.transformer, model.lora_targets, "transformer")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained(model):
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return model


def trained(model: SD3) -> list[nn.Parameter]:
    return [p for p in model.pipe.transformer.parameters() if p.requires_grad]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------ the network


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 1e-4, 0.015), ("nf4", 0.02, 0.15)])
def test_the_velocity_is_near_that_of_the_whole_base(
    asked: Callable[..., Tensor], kind: str, least: float, most: float
):
    with torch.no_grad():
        assert least < relative(asked(tiny_sd3(kind)), asked(tiny_sd3())) < most


def nf4_bytes(values: int, rows: int) -> int:
    """Codes, a scale per 64 values, a scale per 256 of those scales (padded to 256), the levels and a mean."""
    del rows
    upper = 4 * values // SUPERBLOCK if values > SUPERBLOCK else 4 * 256
    return values // 2 + values // 64 + upper + 4 * (16 + 1)


PACKED: dict[str, Callable[[int, int], int]] = {
    "int8": lambda values, rows: values + 5 * rows,  # a scale and a zero point a row
    "nf4": nf4_bytes,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_codes_and_scales(kind: str):
    whole, held = tiny_sd3(), tiny_sd3(kind)
    shapes = [m.weight.shape for b in whole.blocks() for m in b.modules() if isinstance(m, nn.Linear)]
    assert len(shapes) == sum(isinstance(m, QuantisedLinear) for b in held.blocks() for m in b.modules())
    packed = sum(PACKED[kind](s.numel(), s[0]) for s in shapes)
    saved = weight_bytes(whole.pipe.transformer) - weight_bytes(held.pipe.transformer)
    assert saved == 4 * sum(s.numel() for s in shapes) - packed
    assert not any(is_quantised(p) for name, p in held.pipe.transformer.named_parameters() if "blocks" not in name)


def by_diffusers(folder: str | Path) -> Any:
    """The transformer with blocks quantised to int8 by diffusers itself."""
    from diffusers import SD3Transformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    outside = [name for name, _ in tiny_sd3().pipe.transformer.named_children() if name != "transformer_blocks"]
    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=outside)
    return SD3Transformer2DModel.from_pretrained(
        Path(folder) / "transformer", quantization_config=config, torch_dtype=torch.float32
    )


def test_int8_is_what_diffusers_itself_makes_of_the_blocks(asked: Callable[..., Tensor]):
    model, ours = tiny_sd3(), tiny_sd3("int8")
    model.pipe.transformer = by_diffusers(model.pipe.config._name_or_path)
    with torch.no_grad():
        assert torch.equal(asked(ours), asked(model))


def test_a_weight_that_nf4_cannot_divide_stays_whole():
    block = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 130))
    quantise([block], "nf4", weight_quantiser("nf4"))
    assert [is_quantised(layer.weight) for layer in block] == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_remade_weights(kind: str):
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 256), torch.randn(3, 128, requires_grad=True)
    held = QuantisedLinear(layer, weight_quantiser(kind))  # type: ignore[arg-type]
    remade = held(torch.eye(128)).T - layer.bias[:, None]
    (gradient,) = torch.autograd.grad(held(x).square().sum(), x)
    (expected,) = torch.autograd.grad((x @ remade.T + layer.bias).square().sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def gradients(model: SD3, v: Tensor) -> dict[str, Tensor]:
    """The gradient of every adapter that has one; the last block does not use the text queries."""
    model.pipe.transformer.zero_grad()
    v.square().mean().backward()
    found = {name: p.grad for name, p in model.pipe.transformer.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in found.items() if gradient.abs().max() > 0}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_from_the_forward_that_rollouts_have(asked: Callable[..., Tensor], kind: str):
    whole, model = with_adapters(tiny_sd3()), with_adapters(tiny_sd3(kind))
    with torch.no_grad():
        before = asked(model)
    v = asked(model)
    assert torch.equal(v, before)  # so that the ratio is 1
    found, expected = gradients(model, v), gradients(whole, asked(whole))
    assert found.keys() == expected.keys()
    assert all(".lora_" in name for name in found)
    ours, theirs = (torch.cat([g.flatten() for g in d.values()]) for d in (found, expected))
    assert relative(ours, theirs) < (0.05 if kind == "int8" else 0.5)
    Running(gradient_checkpointing=True).apply(model)
    again = torch.cat([g.flatten() for g in gradients(model, asked(model)).values()])
    assert relative(again, ours) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_keeps_its_whole_weight_for_the_backward_pass(kind: str):
    kept = []
    for model in (with_adapters(tiny_sd3()), with_adapters(tiny_sd3(kind))):
        cond = model.encode(["a circle"])
        kept.append(saved_for_backward(model, torch.zeros(1, *model.latent_shape(16, 16)), cond, 1.0))
    assert kept[1] <= 1.02 * kept[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_16_bits_is_quantised_as_well(asked: Callable[..., Tensor], kind: str):
    model = with_adapters(SD3("tiny_sd3", train_dtype="bfloat16", quantised=kind, **PARTS))  # type: ignore[arg-type]
    assert model.pipe.transformer.dtype == torch.bfloat16
    whole = with_adapters(SD3("tiny_sd3", train_dtype="bfloat16", **PARTS))  # type: ignore[arg-type]
    v = asked(model)
    assert gradients(model, v)
    assert all(p.dtype == torch.float32 for p in trained(model))
    assert relative(v.detach(), asked(whole).detach()) < (0.03 if kind == "int8" else 0.2)


def test_every_kind_is_a_base_of_its_own():
    bases = [weights_fingerprint(tiny_sd3(kind).denoisers()) for kind in (None, *KINDS)]
    assert len(set(bases)) == 3
    assert weights_fingerprint(tiny_sd3("int8").denoisers()) == bases[1]


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_are_not_merged(kind: str):
    model = tiny_sd3(kind)
    assert not Policy(model.denoisers(), Lora(rank=4), model.lora_targets, merge=True).merge


# ------------------------------------------------------------ runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_adapters_only_from_a_ratio_of_one(tiny: Callable[..., DictConfig], kind: str):
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    cfg = tiny("algo=grpo", f"model.quantised={kind}", "optimizer.lr=0.01", "trainer.check_val_every_n_epoch=9")
    recipe = build_recipe(cfg)
    base, module = weights_fingerprint(recipe.model.denoisers()), AlignModule(recipe)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    assert trainer.callback_metrics["train/on_policy_gap"] < 1e-5
    assert module.base == base
    live = module.live.trained()
    assert all(".lora_" in name for name in live)
    assert any(p.abs().max() > 0 for name, p in live.items() if ".lora_B." in name)
    held = {line.name: line.size for line in module.memory_plan()}
    assert held["denoisers"] == weight_bytes(recipe.model.pipe.transformer)
    assert "adapted weights, merged" not in held


@pytest.mark.parametrize("kind", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_the_exported_adapters_load_on_the_whole_base_and_on_the_quantised_one(
    tiny: Callable[..., DictConfig], tmp_path: Path, say: Callable[..., Any], kind: str
):
    from flowalign.cli import main
    from flowalign.commands.saved import load_run

    last = fitted(tiny, f"model.quantised={kind}")
    assert say(main, "export", f"ckpt={last}", f"to={tmp_path / 'lora'}")[0] == 0
    assert f"`tiny_sd3`, in {kind}" in (tmp_path / "lora" / "README.md").read_text()
    trained = load_run(last, "live")
    assert trained.model.quantised == kind
    aligned = picture(trained.model.pipe)
    whole = plain_pipeline()
    before = picture(whole)
    whole.load_lora_weights(tmp_path / "lora")
    # The adapters change the image; quantising the base changes it less, at least in 8 bits.
    moved, left = ((picture(whole) - other).abs().mean() for other in (before, aligned))
    assert moved > 1e-3
    if kind == "int8":
        assert left < moved / 2
        pipe = plain_pipeline()
        pipe.transformer = by_diffusers(ROOT / "flowalign" / "assets" / "tiny_sd3")
        pipe.load_lora_weights(tmp_path / "lora")
        assert (picture(pipe) - aligned).abs().max() < 1e-5
    code, _, said = say(main, "export", f"ckpt={last}", f"to={tmp_path / 'merged'}", "merge=true")
    assert code == 2
    assert "use merge=false" in said


def fitted(tiny: Callable[..., DictConfig], *words: str) -> str:
    """The last checkpoint of a short run."""
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    cfg = tiny("callbacks=checkpoint", "optimizer.lr=0.01", "trainer.check_val_every_n_epoch=9", *words)
    recipe = build_recipe(cfg)
    trainer = build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(AlignModule(recipe))
    return str(Path(cfg.paths.output_dir) / "checkpoints" / "last.ckpt")


def test_a_checkpoint_goes_on_with_its_own_kind_of_base_only(tiny: Callable[..., DictConfig]):
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe, build_trainer, plan_accumulation

    last, cfg = fitted(tiny, "model.quantised=int8"), tiny("trainer.max_epochs=2")
    recipe = build_recipe(cfg)
    with pytest.raises(ConfigError, match="model.quantised=int8, as it was then, .* model.quantised=null"):
        build_trainer(cfg, plan_accumulation(cfg, recipe)).fit(AlignModule(recipe), ckpt_path=last)


def test_what_quantised_weights_do_not_go_with_is_refused(compose: Callable[..., DictConfig]):
    for words, nearest in ((("tune=full",), "use tune=lora"), (("tune=lora", "strategy=fsdp"), "use strategy=ddp")):
        with pytest.raises(ConfigError, match=nearest):
            check_groups(compose("model.quantised=int8", *words))
    check_groups(compose("model.quantised=int8", "tune=lora"))


def test_a_latent_reward_wants_whole_blocks():
    from flowalign.rewards.latent.trunk import Trunk

    with pytest.raises(ValueError, match="model.quantised=null"):
        Trunk(tiny_sd3("int8"), 1)


def test_an_absent_library_is_named_by_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"pip install 'flowalign\[quant\]'"):
        tiny_sd3("nf4")
