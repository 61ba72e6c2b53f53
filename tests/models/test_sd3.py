"""The SD3 adapter reproduces the pipeline: same noise, schedule, network and images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.dynamics import ODE, FlowSDE
from flowalign.flow import shifted
from flowalign.models import schedule
from flowalign.models.sd3 import SD3
from flowalign.sampler import Noise, deterministic, walk
from flowalign.solvers import DPM, Euler
from flowalign.types import Conditioning

PROMPTS, NEGATIVES = ["two red circles", "a blue square above it"], ["blurry", ""]
HEIGHT, WIDTH, STEPS, TOKENS = 32, 48, 6, 16


@pytest.fixture(scope="module")
def sd3(sd3_folder: Path) -> SD3:
    return SD3(str(sd3_folder), max_sequence_length=TOKENS)


@pytest.fixture(scope="module")
def theirs(sd3: SD3) -> Callable[..., Tensor]:
    """The pipeline's own call, which draws its own noise."""

    def call(guidance: float, output_type: str, prompts: list[str] = PROMPTS) -> Tensor:
        sd3.pipe.set_progress_bar_config(disable=True)
        return sd3.pipe(
            prompts,
            negative_prompt=NEGATIVES,
            guidance_scale=guidance,
            num_inference_steps=STEPS,
            height=HEIGHT,
            width=WIDTH,
            max_sequence_length=TOKENS,
            generator=torch.Generator().manual_seed(7),
            output_type=output_type,
        ).images

    return call


@dataclass(frozen=True)
class Given(Noise):
    """The pipeline's noise instead of the keyed one."""

    noise: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, stream: int) -> Tensor:
        return self.noise


def ours(sd3: SD3, guidance: float, prompts: list[str] = PROMPTS) -> Tensor:
    """Euler sampling with the adapter, from the same noise, to latents."""
    cond = sd3.encode(prompts, NEGATIVES)
    noise = torch.randn(2, *sd3.latent_shape(HEIGHT, WIDTH), generator=torch.Generator().manual_seed(7))
    sigmas = sd3.sigmas(STEPS, HEIGHT, WIDTH)
    with torch.no_grad():
        rollout = walk(
            lambda x, sigma, rows: sd3.velocity(x, sigma, cond.index(rows), guidance),
            sigmas,
            deterministic(STEPS),
            ODE(),
            Euler(),
            Given(0, 0, range(2), noise.shape[1:], noise=noise),
        )
    return rollout.x0


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_walk_ends_where_the_pipeline_does(sd3: SD3, theirs: Callable[..., Tensor], guidance: float):
    latents = ours(sd3, guidance)
    assert distance(latents, theirs(guidance, "latent")) < 1e-5
    assert distance(sd3.decode(latents), theirs(guidance, "pt")) < 1e-5


def test_the_comparison_notices_another_guidance_and_swapped_prompts(sd3: SD3, theirs: Callable[..., Tensor]):
    latents = theirs(5.0, "latent")
    assert distance(ours(sd3, 6.0), latents) > 1e-3
    assert distance(ours(sd3, 5.0, PROMPTS[::-1]), latents) > 1e-3


def test_t5_tokens_reach_the_network(sd3: SD3):
    cond = sd3.encode(PROMPTS)
    clip = 77
    assert cond["tokens"].shape == (2, clip + TOKENS, 64)
    assert cond["tokens"][:, clip:].abs().min(dim=-1).values.max() > 0
    x = torch.randn(2, *sd3.latent_shape(HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0))
    cut = Conditioning({**cond, "tokens": torch.cat([cond["tokens"][:, :clip], 0 * cond["tokens"][:, clip:]], dim=1)})
    with torch.no_grad():
        assert distance(sd3.velocity(x, 0.5, cond), sd3.velocity(x, 0.5, cut)) > 1e-3


def test_without_t5_its_tokens_are_zeros_and_still_as_many(sd3_folder: Path):
    sd3 = SD3(str(sd3_folder), max_sequence_length=TOKENS, absent=("text_encoder_3", "tokenizer_3"))
    tokens = sd3.encode(PROMPTS)["tokens"]
    assert tokens.shape == (2, 77 + TOKENS, 64)
    assert tokens[:, 77:].abs().max() == 0


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_batch_of_mixed_noise_levels_equals_its_rows_alone(sd3: SD3, guidance: float):
    cond = sd3.encode(PROMPTS, NEGATIVES)
    x = torch.randn(2, *sd3.latent_shape(HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.9, 0.2])
    with torch.no_grad():
        both = sd3.velocity(x, sigma, cond, guidance)
        for i in range(2):
            alone = sd3.velocity(x[i : i + 1], sigma[i : i + 1], cond.index(slice(i, i + 1)), guidance)
            assert distance(alone, both[i : i + 1]) < 1e-5
        assert distance(sd3.velocity(x, sigma.flip(0), cond, guidance), both) > 1e-3


def test_guidance_at_one_needs_no_negative_prompt(sd3: SD3):
    cond = sd3.encode(PROMPTS)
    assert not any(key.startswith("neg.") for key in cond)
    x = torch.zeros(2, *sd3.latent_shape(HEIGHT, WIDTH))
    with torch.no_grad():
        assert sd3.velocity(x, 1.0, cond, 1.0).isfinite().all()


# ------------------------------------------------------------ schedule


def test_the_schedule_is_the_schedulers(sd3: SD3, theirs: Callable[..., Tensor]):
    theirs(1.0, "latent")
    assert torch.equal(sd3.sigmas(STEPS, HEIGHT, WIDTH), sd3.pipe.scheduler.sigmas)


def test_shift_3_gives_the_published_table(sd3: SD3):
    # SD3's scheduler shifts the low end twice, which leaves nearly nothing for the last step.
    table = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert torch.allclose(sd3.sigmas(10, HEIGHT, WIDTH), torch.tensor(table), atol=5e-5)


def test_a_resolution_dependent_shift_is_the_pipelines(sd3: SD3, theirs: Callable[..., Tensor], monkeypatch: Any):
    from diffusers import FlowMatchEulerDiscreteScheduler

    dynamic = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.16, base_image_seq_len=16, max_image_seq_len=1024
    )
    monkeypatch.setattr(sd3.pipe, "scheduler", dynamic)
    theirs(1.0, "latent")
    mine = sd3.sigmas(STEPS, HEIGHT, WIDTH)
    assert torch.equal(mine, sd3.pipe.scheduler.sigmas)
    assert (sd3.sigmas(STEPS, 2 * HEIGHT, 2 * WIDTH)[1:-1] > mine[1:-1]).all()  # more tokens, more time spent in noise


def test_asking_for_a_schedule_leaves_the_pipelines_own_alone(sd3: SD3):
    before = sd3.pipe.scheduler.sigmas.clone()
    sd3.sigmas(3, HEIGHT, WIDTH)
    assert torch.equal(sd3.pipe.scheduler.sigmas, before)


@pytest.mark.parametrize("shift", [1.57, 1.67, 2.34, 3.0])
def test_every_shift_begins_at_pure_noise(shift: float):
    """s / (1 + (s - 1)) is 1.0000001 for 1.57 and 0.99999994 for 1.67 and 2.34, and Flow-SDE's rate at 1 infinite."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for evenly in (True, False):
        sigmas = schedule.sigmas(FlowMatchEulerDiscreteScheduler(shift=shift), 10, evenly, None)
        assert sigmas[0] == 1
        x, v = torch.randn(2, 1, 4, 4)
        _, std = FlowSDE(0.7).moments(x, v, sigmas[0], sigmas[1], sigmas[1])
        # At 1 the second level stands in for the first: 0.7 sqrt(1 / (1 - σ1)) sqrt(1 - σ1).
        assert std.item() == pytest.approx(0.7, rel=1e-5)
        assert DPM().start().step(x, v, sigmas[0], sigmas[1], last=False).isfinite().all()


def test_the_shift_is_that_of_the_schedule(sd3: SD3, monkeypatch: Any):
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert sd3.shift(HEIGHT, WIDTH) == 3.0
    dynamic = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.16, base_image_seq_len=16, max_image_seq_len=1024
    )
    monkeypatch.setattr(sd3.pipe, "scheduler", dynamic)
    even = torch.linspace(1, 1 / 1000, STEPS, dtype=torch.float64)
    assert torch.allclose(sd3.sigmas(STEPS, HEIGHT, WIDTH)[:-1].double(), shifted(even, sd3.shift(HEIGHT, WIDTH)))
    assert sd3.shift(2 * HEIGHT, 2 * WIDTH) > sd3.shift(HEIGHT, WIDTH) > 1


def test_an_encoded_picture_is_what_the_decoder_takes(sd3: SD3):
    """Random weights do not invert each other; the normalisation of latents does."""
    media = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    z = sd3.encode_images(media)
    assert z.shape == (2, *sd3.latent_shape(HEIGHT, WIDTH))
    vae = sd3.pipe.vae
    with torch.no_grad():
        mean = vae.encode(2 * media - 1).latent_dist.mean
        decoded = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    assert distance(z, (mean - 0.1) * 1.3) < 1e-5
    assert distance(sd3.decode(z), decoded) < 1e-5


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(("size", "nearest"), [((30, 48), "32×48"), ((1, 1), "4×4"), ((33, 47), "32×48")])
def test_an_impossible_size_is_refused_with_the_nearest_one(sd3: SD3, size: tuple[int, int], nearest: str):
    with pytest.raises(ValueError, match=f"multiples of 4; the nearest is {nearest}"):
        sd3.check_size(*size)
    sd3.check_size(HEIGHT, WIDTH)


def test_a_picture_beyond_the_learnt_positions_is_refused(sd3: SD3):
    sd3.check_size(128, 128)
    with pytest.raises(ValueError, match=r"up to 128×128 \(got 128×132\)"):
        sd3.check_size(128, 132)


def test_a_damaged_folder_is_not_called_a_network_problem(sd3_folder: Path, tmp_path: Path):
    shutil.copytree(sd3_folder, tmp_path / "torn")
    for weights in (tmp_path / "torn" / "transformer").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="torn is incomplete or damaged"):
        SD3(str(tmp_path / "torn"))


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no model_index.json.*embedded pipelines: .*tiny_sd3"):
        SD3(str(tmp_path))


def test_a_name_that_is_neither_embedded_nor_a_hub_id_is_refused():
    with pytest.raises(ValueError, match="tiny_sd4 is neither a folder .* nor a hub id like org/name"):
        SD3("tiny_sd4")


def test_a_pipeline_of_another_family_is_refused(sd3_folder: Path, tmp_path: Path):
    shutil.copytree(sd3_folder, tmp_path / "flux")
    index = json.loads((tmp_path / "flux" / "model_index.json").read_text())
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(
        ValueError, match="holds a FluxPipeline, but this model adapter drives a StableDiffusion3Pipeline"
    ):
        SD3(str(tmp_path / "flux"))


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "CogVideoXImageToVideoPipeline"])
def test_cogvideox_is_refused_because_it_does_not_match_flows(tmp_path: Path, name: str):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"holds a {name}, which is no flow-matching model"):
        SD3(str(tmp_path))


def test_a_hub_model_out_of_reach_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing is not in the local cache, and the hub did not give it"):
        SD3("nobody/nothing")


def test_an_unknown_dtype_is_refused_with_the_known_ones(sd3_folder: Path):
    with pytest.raises(ValueError, match=r"float32, bfloat16.*got 'float31'"):
        SD3(str(sd3_folder), dtype="float31")


def test_types_are_chosen_for_the_trained_part_and_the_rest_apart(sd3_folder: Path):
    sd3 = SD3(str(sd3_folder), dtype="bfloat16", train_dtype="float32", max_sequence_length=TOKENS)
    stored = SD3(str(sd3_folder)).pipe.transformer.state_dict()
    assert all(torch.equal(t, stored[name]) for name, t in sd3.pipe.transformer.state_dict().items())  # not rounded
    assert sd3.pipe.vae.dtype == sd3.pipe.text_encoder_3.dtype == torch.bfloat16
    assert sd3.decode(torch.zeros(1, *sd3.latent_shape(HEIGHT, WIDTH))).dtype == torch.float32
    x = torch.zeros(1, *sd3.latent_shape(HEIGHT, WIDTH))
    with torch.no_grad():
        assert sd3.velocity(x, 0.5, sd3.encode(PROMPTS[:1])).dtype == torch.float32


def test_a_vae_with_a_dtype_of_its_own_computes_in_it_under_autocast_too(sd3_folder: Path):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = SD3(str(sd3_folder), max_sequence_length=TOKENS).decode(x)
    own = SD3(str(sd3_folder), dtype="bfloat16", vae_dtype="float32", max_sequence_length=TOKENS)
    assert own.pipe.text_encoder_3.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.decode(x), expected)
        assert not torch.equal(SD3(str(sd3_folder), max_sequence_length=TOKENS).decode(x), expected)
