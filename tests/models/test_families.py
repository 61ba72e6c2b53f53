"""Every model of conf/model, on a random pipeline of its family: the adapter reproduces the pipeline.

A family is a module of tests/models/tiny with PIPELINE, GUIDANCE, build() and arguments(guidance), and if needed

    ADAPTER         name of the adapter class, if several use the same pipeline class
    MODEL, CALL     further settings of the adapter and of the pipeline's call
    NEGATIVE        the negative prompt that its pipeline uses by default
    FRAMES, SIZE    frames of a video; height and width
    IMAGES          the reference images of each of the two prompts, (n, 3, H, W)
    patched()       context in which the pipeline's own call runs
    equip(pipe)     adds what the pipeline needs and cannot be saved in its folder
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowalign.alive import PeakMemory
from flowalign.checks import check_signatures
from flowalign.checks.signatures import locate
from flowalign.cli import main
from flowalign.decoding import decoding_bytes
from flowalign.dynamics import ODE
from flowalign.media import save
from flowalign.memory import simulate_pass
from flowalign.models.base import FlowModel
from flowalign.models.video import VideoModel
from flowalign.policy import Lora
from flowalign.rewards.latent import Latent
from flowalign.rewards.latent.trunk import Trunk, main_blocks
from flowalign.run import build_recipe, build_trainer, plan_accumulation
from flowalign.running import Running
from flowalign.sampler import Noise, deterministic, walk
from flowalign.scoring import Scorer
from flowalign.solvers import Euler
from flowalign.types import Conditioning
from tests.conftest import ROOT, settled
from tests.conftest import TINY as TINY_WORDS

if TYPE_CHECKING:
    from omegaconf import DictConfig

TINY = {
    getattr(module, "ADAPTER", module.PIPELINE): module
    for path in sorted((Path(__file__).parent / "tiny").glob("*.py"))
    if hasattr(module := import_module(f"tests.models.tiny.{path.stem}"), "PIPELINE")
}
MODELS = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))
PROMPTS, NEGATIVES = ["two red circles", "a blue square above it all"], ["blurry", ""]
HEIGHT, WIDTH, STEPS, TOKENS = 32, 48, 6, 16
EVERY = slice(None)


@dataclass
class Family:
    """A model of conf/model with random weights."""

    model: FlowModel
    tiny: ModuleType

    @property
    def size(self) -> dict[str, Any]:
        """Height, width and, for videos, frames."""
        frames = {} if self.model.modality == "image" else {"frames": self.tiny.FRAMES}
        height, width = getattr(self.tiny, "SIZE", (HEIGHT, WIDTH))
        return {"height": height, "width": width, **frames}

    def theirs(self, guidance: float, output_type: str) -> Tensor:
        """The pipeline's own call, which draws its own noise; prompt by prompt if it takes reference images."""
        pipe, size = self.model.pipe, self.size
        if "frames" in size:
            size["num_frames"] = size.pop("frames")
        pipe.set_progress_bar_config(disable=True)
        generator, results = torch.Generator().manual_seed(7), []
        for rows in [slice(0, 1), slice(1, 2)] if self.model.sees_images else [slice(0, 2)]:
            with getattr(self.tiny, "patched", nullcontext)():
                result = pipe(
                    prompt=list(PROMPTS[rows]), num_inference_steps=STEPS, generator=generator,
                    output_type=output_type, **size, **self.seen(rows.start),
                    **{} if hasattr(self.tiny, "NEGATIVE") else {"negative_prompt": list(NEGATIVES[rows])},
                    **self.tiny.arguments(guidance), **{"max_sequence_length": TOKENS} | getattr(self.tiny, "CALL", {}),
                )  # fmt: skip
            results.append(torch.as_tensor(result[0]))
        return torch.cat(results)

    def seen(self, prompt: int) -> dict[str, Any]:
        """The reference images of a prompt in the format of the pipeline's call."""
        if not self.model.sees_images:
            return {}
        arrays = (self.tiny.IMAGES[prompt] * 255).round().byte().permute(0, 2, 3, 1).numpy()
        images = [Image.fromarray(array) for array in arrays]
        return {"image": images if len(images) > 1 else images[0]}

    def encode(
        self, rows: slice = EVERY, prompts: list[str] = PROMPTS, turned: bool = False, negative: bool = True
    ) -> Conditioning:
        """Encode the prompts; `turned`: each with the reference images of the other."""
        negatives = [self.tiny.NEGATIVE] * 2 if hasattr(self.tiny, "NEGATIVE") else NEGATIVES
        texts = (prompts[rows], negatives[rows] if negative else None)
        if not self.model.sees_images:
            return self.model.encode(*texts)
        images = self.tiny.IMAGES[::-1] if turned else self.tiny.IMAGES
        size = self.size
        return self.model.encode(*texts, images[rows], (size["height"], size["width"], size.get("frames")))

    def ours(self, guidance: float, sign: float = 1.0, bend: float = 1.0, **changes: Any) -> Tensor:
        """Euler sampling with the adapter, from the same noise, to latents."""
        cond = self.encode(**changes)
        generator, shape = torch.Generator().manual_seed(7), self.model.latent_shape(**self.size)
        draws = (1, 1) if self.model.sees_images else (2,)
        noise = torch.cat([torch.randn(n, *shape, generator=generator) for n in draws])
        with torch.no_grad():
            return walk(
                lambda x, s, rows: sign * self.model.velocity(x, s, cond.index(rows), guidance),
                self.model.sigmas(STEPS, **self.size) ** bend,
                deterministic(STEPS), ODE(), Euler(), Given(0, 0, range(2), noise.shape[1:], noise=noise),
            ).x0  # fmt: skip


@dataclass(frozen=True)
class Given(Noise):
    """The pipeline's noise instead of the keyed one."""

    noise: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, stream: int) -> Tensor:
        return self.noise


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The random pipeline of a family, saved in diffusers layout."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            TINY[name].build().save_pretrained(root / name)
        return root / name

    return folder


def adapter_of(name: str) -> type[FlowModel]:
    """The adapter class of a YAML in conf/model."""
    node = OmegaConf.load(ROOT / "conf/model" / f"{name}.yaml")
    return locate(node.get("model", node)["_target_"])


def key_of(adapter: type[FlowModel]) -> str:
    """The key of its random pipeline in TINY."""
    return adapter.__name__ if adapter.__name__ in TINY else adapter.pipeline


KINDS = {adapter_of(name).__name__: name for name in reversed(MODELS)}
"""One model per adapter: the others differ only in their weights."""


@pytest.fixture(scope="session")
def make(folders: Callable[[str], Path]) -> Callable[[str], Family]:
    """Makes a family with its own weights, for tests that change them."""

    def made(kind: str) -> Family:
        adapter = adapter_of(KINDS[kind])
        tiny = TINY[key_of(adapter)]
        model = adapter(str(folders(key_of(adapter))), **settings_of(tiny))
        if hasattr(tiny, "equip"):
            tiny.equip(model.pipe)
        return Family(model, tiny)

    return made


def settings_of(tiny: ModuleType) -> dict[str, Any]:
    return {"max_sequence_length": TOKENS} | getattr(tiny, "MODEL", {})


@pytest.fixture(scope="session")
def made(make: Callable[[str], Family]) -> Callable[[str], Family]:
    """Shares a family between all tests that do not change it."""
    return lru_cache(maxsize=None)(make)


@pytest.fixture
def family(made: Callable[[str], Family], kind: str) -> Family:
    return made(kind)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_random_pipeline_and_says_what_it_loads(compose: Callable[..., DictConfig], name: str):
    cfg = compose(f"model={name}")
    assert key_of(adapter_of(name)) in TINY, "write tests/models/tiny/…"
    assert cfg.model.pretrained == "tiny_sd3" or cfg.model.pretrained.count("/") == 1
    check_signatures(cfg)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_ends_where_the_pipeline_does(family: Family):
    for guidance in family.tiny.GUIDANCE:
        pictures = family.model.decode(family.ours(guidance))
        theirs = family.theirs(guidance, "pt")
        assert pictures.shape == theirs.shape
        assert distance(pictures, theirs) <= 1e-5, guidance
        assert pictures.std() > 0.01  # constant images would always be equal


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_notices_what_is_wrong(family: Family):
    guidance = max(family.tiny.GUIDANCE)
    right = family.ours(guidance)
    assert distance(family.ours(guidance, prompts=PROMPTS[::-1]), right) > 1e-3
    assert distance(family.ours(guidance, sign=-1.0), right) > 1e-3
    assert distance(family.ours(guidance, bend=1.05), right) > 1e-3
    if family.model.sees_images:
        assert distance(family.ours(guidance, turned=True), right) > 1e-3
    if len(family.tiny.GUIDANCE) > 1:
        assert distance(family.ours(guidance + 1), right) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoding_takes_what_is_planned(family: Family):
    model = family.model
    x = torch.zeros(3, *model.latent_shape(**family.size))
    vae = model.pipe.vae
    with PeakMemory([x, *vae.parameters(), *vae.buffers()]) as alive:
        model.decode(x)
    assert decoding_bytes(model, tuple(x.shape[1:]), 3, x.device) == pytest.approx(alive.peak, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", sorted({*KINDS} - {"Lumina2", "QwenImage", "QwenImageEdit", "WanTwoExperts", "ZImage"})
)
def test_a_pass_of_fake_tensors_takes_what_a_real_one_does(make: Callable[[str], Family], kind: str):
    """The other families branch on the values of their inputs, which fake tensors do not have."""
    family = make(kind)
    model, shape, cond = family.model, family.model.latent_shape(**family.size), family.encode(slice(0, 1))
    Running(gradient_checkpointing=model.checkpointing_is_exact).apply(model)
    networks = nn.ModuleList(model.denoisers().values()).requires_grad_(True)
    planned = simulate_pass(model, shape, cond, nullcontext, 2)
    for p in networks.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    x, cond = torch.zeros(2, *shape), cond.repeat_interleave(2)
    with PeakMemory([x, *cond.values(), *networks.parameters(), *networks.buffers()]) as alive:
        model.velocity(x, 0.5, cond).square().mean().backward()
    assert planned == pytest.approx(alive.peak, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_knows_the_convolutions_of_its_vae(family: Family):
    parts = family.model.pipe.vae.modules()
    assert family.model.vae_in_3d == any(isinstance(part, nn.Conv3d) for part in parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_mixed_noise_levels_equals_its_rows_alone(family: Family):
    model, guidance = family.model, max(family.tiny.GUIDANCE)
    cond = family.encode()
    x = torch.randn(2, *model.latent_shape(**family.size), generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.95, 0.2])
    with torch.no_grad():
        both = model.velocity(x, sigma, cond, guidance)
        assert both.shape == x.shape
        assert both.dtype == torch.float32
        for i in range(2):
            row = slice(i, i + 1)
            alone = model.velocity(x[row], sigma[row], family.encode(row), guidance)
            assert distance(alone, both[row]) < 3e-5
        assert distance(model.velocity(x, sigma.flip(0), cond, guidance), both) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_conditioning_survives_what_is_done_to_it(family: Family, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model, guidance = family.model, max(family.tiny.GUIDANCE)
    cond = family.encode()
    assert cond.batch_size == 2
    save_file({key: t.contiguous() for key, t in cond.items()}, tmp_path / "cond.safetensors")
    rows = [family.encode(slice(i, i + 1)) for i in range(2)]
    x = torch.randn(2, *model.latent_shape(**family.size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v = model.velocity(x, 0.7, cond, guidance)
        assert torch.equal(model.velocity(x, 0.7, Conditioning(load_file(tmp_path / "cond.safetensors")), guidance), v)
        assert distance(model.velocity(x, 0.7, Conditioning.cat(rows), guidance), v) < 3e-5
        swapped = cond.index(torch.tensor([1, 0, 1]))
        again = model.velocity(x[[1, 0, 1]], 0.7, swapped, guidance)
        assert distance(again, v[[1, 0, 1]]) < 3e-5
        twice = model.velocity(x.repeat_interleave(2, 0), 0.7, cond.repeat_interleave(2), guidance)
        assert distance(twice[::2], v) < 3e-5


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_become_equally_many_tokens_where_the_family_says_so(family: Family):
    short, long = (family.encode(slice(i, i + 1)) for i in range(2))
    same = {key: t.shape for key, t in short.items()} == {key: t.shape for key, t in long.items()}
    assert same == family.model.one_text_length


@pytest.mark.parametrize("kind", KINDS)
def test_without_negative_prompts_the_rest_is_the_same(family: Family):
    both, alone = family.encode(), family.encode(negative=False)
    assert alone.keys() == {key for key in both if not key.startswith("neg.")}
    assert all(distance(alone[key], both[key]) < 1e-5 for key in alone)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_videos_become_latents_on_the_scale_of_the_network(family: Family):
    model = family.model
    shape = (2, *([family.size["frames"]] if "frames" in family.size else []), 3)
    media = torch.rand(*shape, family.size["height"], family.size["width"], generator=torch.Generator().manual_seed(1))
    x = model.encode_images(media)
    assert x.shape == (2, *model.latent_shape(**family.size))
    assert distance(model.normalised(model.denormalised(x)), x) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_somewhere_to_go_and_blocks_are_found(family: Family):
    targets = family.model.lora_targets
    for denoiser in family.model.denoisers().values():
        linear = [n for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
        for target in targets:
            assert any(n == target or n.endswith(f".{target}") for n in linear), target
    blocks = family.model.blocks()
    assert blocks
    total = sum(p.numel() for d in family.model.denoisers().values() for p in d.parameters())
    assert sum(p.numel() for b in blocks for p in b.parameters()) > 0.3 * total


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_is_as_exact_as_the_family_says(make: Callable[[str], Family], kind: str):
    family = make(kind)
    model, cond = family.model, family.encode()
    x = torch.randn(2, *model.latent_shape(**family.size), generator=torch.Generator().manual_seed(1))

    def trained() -> tuple[Tensor, Tensor]:
        for denoiser in model.denoisers().values():
            denoiser.requires_grad_().zero_grad()
        v = model.velocity(x, torch.tensor([0.95, 0.2]), cond, 1.0)
        v.square().mean().backward()
        parts = [p.grad.flatten() for d in model.denoisers().values() for p in d.parameters() if p.grad is not None]
        return v.detach(), torch.cat(parts)

    plain = trained()
    for denoiser in model.denoisers().values():
        denoiser.enable_gradient_checkpointing()
    off = [distance(a, b) / float(b.abs().max()) for a, b in zip(trained(), plain, strict=True)]
    assert max(off) < 1e-5 if model.checkpointing_is_exact else max(off) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_blocks_alone_leave_what_they_leave_in_the_whole(family: Family):
    model, cond = family.model, family.encode()
    denoiser = list(model.denoisers().values())[-1]
    every = main_blocks(denoiser)
    x = torch.randn(2, *model.latent_shape(**family.size), generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.3, 0.2])  # both rows belong to the low-noise expert
    for kept in range(1, len(every)):
        given: list[Tensor] = []

        def note(block: torch.nn.Module, args: tuple[Tensor, ...], named: dict[str, Any], given: list[Tensor] = given):
            given.append(args[0] if args else named["hidden_states"])

        hook = every[kept].register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            model.unguided(x, sigma, cond)
        hook.remove()
        noisy = x.clone().requires_grad_()
        tokens = Trunk(model, kept)(noisy, sigma, cond)
        assert torch.equal(tokens, given[0])
        assert tokens.ndim == 3
        (gradient,) = torch.autograd.grad(tokens.square().sum(), noisy)
        assert (gradient.flatten(1).abs().max(dim=1).values > 0).all()
    with pytest.raises(ValueError, match=f"first 1 to {len(every) - 1} of the {len(every)} blocks"):
        Trunk(model, len(every))


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_falls_from_one_to_zero(family: Family):
    sigmas = family.model.sigmas(STEPS, **family.size)
    assert sigmas.shape == (STEPS + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == pytest.approx(1.0, abs=1e-6)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_are_restored_by_the_pipeline(make: Callable[[str], Family], kind: str, tmp_path: Path):
    from diffusers import DiffusionPipeline

    family, tune = make(kind), Lora(rank=4, alpha=8)
    model = family.model
    for denoiser in model.denoisers().values():
        tune(denoiser, model.lora_targets, "transformer")
        for key, parameter in denoiser.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(key)))
    model.save_lora(tmp_path)
    absent = getattr(family.tiny, "MODEL", {}).get("absent", ())
    fresh = DiffusionPipeline.from_pretrained(model.pretrained, **dict.fromkeys(absent))
    for name, denoiser in model.denoisers().items():
        if not model.loads_lora:
            getattr(fresh, name).load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        elif name == "transformer":
            fresh.load_lora_weights(tmp_path)
        else:
            fresh.load_lora_weights(tmp_path / name, **{f"load_into_{name}": True})
        (loaded,) = getattr(fresh, name).peft_config.values()
        assert (loaded.r, loaded.lora_alpha) == (4, 8)
        ours, theirs = (
            {key.replace(".default_0.", ".default."): p for key, p in network.named_parameters() if "lora_" in key}
            for network in (denoiser, getattr(fresh, name))
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    again = make(kind).model  # and loaded by us, to continue training
    for name, denoiser in again.denoisers().items():
        Lora(rank=4, alpha=8, start=str(tmp_path))(denoiser, again.lora_targets, name)
        trained = dict(model.denoisers()[name].named_parameters())
        assert all(torch.equal(p, trained[key]) for key, p in denoiser.named_parameters() if "lora_" in key)


# ------------------------------------------------------------ training


class Brightness:
    """The mean of an image or a video."""

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return media.flatten(1).mean(1)


@pytest.fixture
def prompts(tmp_path: Path, made: Callable[[str], Family], kind: str) -> Path:
    """A prompt file, with reference images and with images or videos to train on."""
    family = made(kind)
    tiny = family.tiny
    lines = []
    for i, text in enumerate(PROMPTS):
        record: dict[str, Any] = {"prompt": text, "negative_prompt": NEGATIVES[i]}
        if hasattr(tiny, "IMAGES"):
            record["images"] = [f"{i}_{j}.png" for j in range(len(tiny.IMAGES[i]))]
            for image, file in zip(tiny.IMAGES[i], record["images"], strict=True):
                array = (image * 255).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(array).save(tmp_path / file)
        record |= to_learn_from(family, tmp_path, i)
        lines.append(json.dumps(record))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path / "prompts.jsonl"


def to_learn_from(family: Family, folder: Path, number: int) -> dict[str, str]:
    """Write a random image of another size, or a longer video, and return the fields with which a prompt names it."""
    shape = [family.size["frames"] + 2] if "frames" in family.size else []
    media = torch.rand(*shape, 3, 40, 70, generator=torch.Generator().manual_seed(number))
    key, suffix = ("video", "gif") if shape else ("image", "png")
    save(media, folder / f"real_{number}.{suffix}")
    return {key: f"real_{number}.{suffix}"}


@pytest.mark.parametrize("algo", ["grpo", "nft"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_starts_on_policy_and_moves_the_weights(
    tiny: Callable[..., DictConfig], make: Callable[[str], Family], prompts: Path, kind: str, algo: str
):
    from flowalign.module import AlignModule

    family = make(kind)
    size = {"frames": "null"} | family.size
    areas = [f"resolution.{part}.{key}={value}" for part in ("train", "eval") for key, value in size.items()]
    guidance = max(family.tiny.GUIDANCE)
    cfg = tiny(
        f"algo={algo}", f"rollout.guidance={guidance}", "steps.width=2" if algo == "grpo" else "times.num=2",
        "trainer.check_val_every_n_epoch=9", "optimizer.lr=0.01", *(f"++{word}" for word in areas), "batch.micro=4",
    )  # fmt: skip
    for stage in ("train", "val", "test"):
        cfg.data[stage] = {"_target_": "flowalign.prompts.PromptSet.read", "path": str(prompts)}
    recipe = build_recipe(cfg)
    recipe.model, recipe.scorer = family.model, Scorer(Brightness())
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/loss"].isfinite()
    if algo == "grpo":
        assert trainer.callback_metrics["train/on_policy_gap"] < 1e-5
    assert any((p != 0).any() for name, p in module.live.trained().items() if "lora_B" in name)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if issubclass(adapter_of(KINDS[kind]), VideoModel)])
def test_every_family_of_videos_learns_from_given_ones(
    tiny: Callable[..., DictConfig], make: Callable[[str], Family], prompts: Path, kind: str
):
    from flowalign.module import AlignModule

    family = make(kind)
    areas = [f"++resolution.{part}.{key}={value}" for part in ("train", "eval") for key, value in family.size.items()]
    cfg = tiny("algo=sft", "times.num=2", "trainer.check_val_every_n_epoch=9", "batch.micro=4", *areas)
    for stage in ("train", "val", "test"):
        cfg.data[stage] = {"_target_": "flowalign.prompts.PromptSet.read", "path": str(prompts)}
    recipe = build_recipe(cfg)
    recipe.model, recipe.scorer = family.model, Scorer(Brightness())
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/matching"].isfinite()
    assert any((p != 0).any() for name, p in module.live.trained().items() if "lora_B" in name)
    assert module.rollout_shown is not None
    assert module.rollout_shown.shape == (2, family.size["frames"], 3, family.size["height"], family.size["width"])


@pytest.mark.parametrize("algo", ["nft", "prfl"])
@pytest.mark.parametrize("kind", ["Wan", "LTXVideo", "SD3"])
def test_a_latent_reward_trains_pictures_and_videos(
    tiny: Callable[..., DictConfig], make: Callable[[str], Family], untaught: Callable[[Any, Path], Path],
    prompts: Path, tmp_path: Path, kind: str, algo: str,
):  # fmt: skip
    from flowalign.module import AlignModule

    family = make(kind)
    size = {"frames": "null"} | family.size
    areas = [f"++resolution.{part}.{key}={value}" for part in ("train", "eval") for key, value in size.items()]
    cfg = tiny(f"algo={algo}", "times.num=2", "trainer.check_val_every_n_epoch=9", "batch.micro=4", *areas)
    for stage in ("train", "val", "test"):
        cfg.data[stage] = {"_target_": "flowalign.prompts.PromptSet.read", "path": str(prompts)}
    cfg.reward = {"_target_": "flowalign.scoring.Scorer", "objective": {
        "_target_": "flowalign.rewards.latent.Latent", "weights": str(untaught(family.model, tmp_path / "reward")),
    }}  # fmt: skip
    recipe = build_recipe(cfg)
    recipe.model = family.model
    module, trainer = AlignModule(recipe), build_trainer(cfg, plan_accumulation(cfg, recipe))
    trainer.fit(module)
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert ("train/matching" in trainer.callback_metrics) == (algo == "prfl")  # prfl adds flow matching by default
    assert any((p != 0).any() for name, p in module.live.trained().items() if "lora_B" in name)
    reward = recipe.scorer.objective["reward"].reward
    assert isinstance(reward, Latent)
    x = torch.randn(2, *family.model.latent_shape(**family.size), generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    reward.of_noisy(x, torch.tensor([0.9, 0.1]), family.encode()).sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().max(dim=1).values > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_networks_survive_their_files(make: Callable[[str], Family], kind: str, tmp_path: Path):
    for name, denoiser in make(kind).model.denoisers().items():
        denoiser.save_pretrained(tmp_path / name)  # type: ignore[operator]
        loaded = type(denoiser).from_pretrained(tmp_path / name).state_dict()  # type: ignore[attr-defined]
        assert loaded.keys() == denoiser.state_dict().keys()
        assert all(torch.equal(loaded[key], value) for key, value in denoiser.state_dict().items())


def test_a_video_model_trains_by_command_and_its_sample_plays(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import imageio_ffmpeg

    for stage in ("train", "test"):
        (tmp_path / f"{stage}.txt").write_text("\n".join(PROMPTS))
    sizes = [f"++resolution.{part}.{key}={n}" for part in ("train", "eval")
             for key, n in (("height", HEIGHT), ("width", WIDTH), ("frames", TINY["WanPipeline"].FRAMES))]  # fmt: skip
    words = settled(*TINY_WORDS, "algo=nft", "model=wan2_1_t2v", f"model.pretrained={folders('WanPipeline')}",
                    "model.dtype=float32", "model.train_dtype=float32", f"model.max_sequence_length={TOKENS}",
                    "encoding.cache=null", "reward=jpeg", "data=folder",
                    f"data.folder={tmp_path}", f"hydra.run.dir={tmp_path}/run")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "train.py", *words, *sizes], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "before_after.png").is_file()
    for name in ("a.mp4", "a.gif"):
        monkeypatch.setattr(sys, "argv", [
            "flowalign", "sample", f"ckpt={tmp_path}/run/checkpoints/last.ckpt", "prompt=two red circles",
            f"to={tmp_path / name}", "steps=2",
        ])  # fmt: skip
        main()
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))[0] == TINY["WanPipeline"].FRAMES
    assert Image.open(tmp_path / "a.gif").n_frames > 1


class Operators(TorchDispatchMode):
    """Counts the calls of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_chosen_attention_kernel_reaches_the_layers(make: Callable[[str], Family], kind: str):
    family = make(kind)
    model, cond = family.model, family.encode()
    x = torch.randn(2, *model.latent_shape(**family.size), generator=torch.Generator().manual_seed(1))

    def run() -> tuple[Tensor, int]:
        with torch.no_grad(), Operators() as operators:
            v = model.velocity(x, torch.tensor([0.95, 0.2]), cond, 1.0)
        return v, operators.calls["_scaled_dot_product_flash_attention_for_cpu"]

    plain, fused = run()
    Running(attention="_native_math").apply(model)
    same, left = run()
    assert fused > 0
    assert left <= (1 if kind == "HunyuanVideo" else 0)  # the layer that refines its text tokens has a fixed kernel
    assert distance(same, plain) < 1e-4 * float(plain.abs().max())
    processors = [m.processor for d in model.denoisers().values() for m in d.modules() if hasattr(m, "processor")]
    assert any(hasattr(p, "_attention_backend") for p in processors) == model.takes_attention_backend
