"""Behaviour of the video families alone; test_families.py checks that they reproduce their pipelines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowalign.checks import ConfigError, check_signatures
from flowalign.models.hunyuan_video import HunyuanVideo
from flowalign.models.ltx_video import LTXVideo
from flowalign.models.video import VideoModel
from flowalign.models.wan import Wan, WanTwoExperts
from flowalign.types import Conditioning
from tests.models.tiny import hunyuan_video, ltx_video, wan2_1, wan2_2

if TYPE_CHECKING:
    from omegaconf import DictConfig


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan2_2")
    wan2_2.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wan(wan_folder: Path) -> Wan:
    return Wan(str(wan_folder), max_sequence_length=16)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((32, 48, None), "set resolution.*.frames"),
        ((32, 48, 8), "the nearest is 9"),
        ((32, 48, 0), "the nearest is 1"),
        ((32, 40, 9), "the nearest is 32×32"),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest(wan: Wan, size: tuple[int, int, int | None], words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        wan.check_size(*size)


def test_possible_sizes_pass(wan: Wan):
    for frames in (1, 5, 33, 81):
        wan.check_size(480, 832, frames)


def test_a_multistep_scheduler_gives_its_noise_levels(wan_folder: Path):
    from diffusers import UniPCMultistepScheduler

    wan = Wan(str(wan_folder))
    shipped = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    wan.pipe.scheduler = shipped
    shipped.set_timesteps(10)
    # UniPC spaces from 1 towards 0.001 instead of 0.
    torch.testing.assert_close(wan.sigmas(10, 32, 48, 9), shipped.sigmas, atol=3e-3, rtol=0)
    assert wan.shift(32, 48, 9) == 3.0


@pytest.mark.parametrize(("adapter", "tiny"), [(Wan, wan2_1), (LTXVideo, ltx_video), (HunyuanVideo, hunyuan_video)])
def test_videos_become_latents_and_back_as_the_vae_alone_does_it(
    adapter: type[VideoModel], tiny: ModuleType, tmp_path: Path
):
    tiny.build().save_pretrained(tmp_path)
    model = adapter(str(tmp_path))
    height, width = getattr(tiny, "SIZE", (32, 48))
    model.check_size(height, width, tiny.FRAMES)
    video = torch.rand(2, tiny.FRAMES, 3, height, width, generator=torch.Generator().manual_seed(0))
    z = model.encode_images(video)
    assert z.shape == (2, *model.latent_shape(height, width, tiny.FRAMES))
    torch.testing.assert_close(model.normalised(model.denormalised(z)), z)
    vae = model.pipe.vae
    with torch.no_grad():
        alone = vae.encode(2 * video.transpose(1, 2) - 1).latent_dist.mode()
        time = [torch.zeros(2)] if adapter is LTXVideo else []
        back = (vae.decode(alone, *time).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(model.denormalised(z), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(z), back, atol=1e-5, rtol=1e-5)
    assert (z - alone).abs().max() > 0.01  # the network uses another scale
    assert back.std() > 0.001


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_that_need_float32_keep_it_beside_text_encoders_and_vaes_of_any_type(wan_folder: Path, dtype: str):
    network = Wan(str(wan_folder), dtype=dtype, train_dtype="bfloat16").pipe.transformer
    types = {name: p.dtype for name, p in network.named_parameters()}
    assert types["scale_shift_table"] == types["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert types["proj_out.weight"] == torch.bfloat16


def test_embedded_guidance_is_rounded_as_in_the_pipeline(tmp_path: Path):
    hunyuan_video.build().save_pretrained(tmp_path)
    settings: dict[str, Any] = hunyuan_video.MODEL
    model = HunyuanVideo(str(tmp_path), dtype="bfloat16", train_dtype="bfloat16", **settings)
    scales: list[torch.Tensor] = []
    model.pipe.transformer.register_forward_pre_hook(
        lambda _, args, named: scales.append(named["guidance"].float()), with_kwargs=True
    )
    model.pipe.set_progress_bar_config(disable=True)
    model.pipe("a", height=32, width=48, num_frames=5, num_inference_steps=1, output_type="latent", **settings)
    with torch.no_grad():
        model.velocity(torch.zeros(1, *model.latent_shape(32, 48, 5)), 0.5, model.encode(["a"]))
    assert torch.equal(*scales)


def test_ltx_videos_are_written_at_the_rate_that_the_network_is_told(compose: Callable[..., DictConfig]):
    cfg = compose("model=ltx_video")
    assert cfg.resolution.train.fps == cfg.resolution.eval.fps == cfg.model.frame_rate


def test_a_tokenizer_that_is_published_only_in_sentencepiece_format_is_read(tmp_path: Path):
    sentencepiece_format = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    ltx_video.build().save_pretrained(tmp_path)
    expected = LTXVideo(str(tmp_path)).encode(["a red circle"])["tokens"]
    stored = tmp_path / "tokenizer" / "tokenizer.json"
    spm = sentencepiece_format.ModelProto()
    spm.trainer_spec.model_type, spm.trainer_spec.unk_id = spm.trainer_spec.UNIGRAM, 2
    for i, (piece, score) in enumerate(json.loads(stored.read_text())["model"]["vocab"]):
        kind = (spm.SentencePiece.CONTROL, spm.SentencePiece.CONTROL, spm.SentencePiece.UNKNOWN)
        spm.pieces.add(piece=piece, score=score, type=kind[i] if i < 3 else spm.SentencePiece.NORMAL)
    stored.with_name("spiece.model").write_bytes(spm.SerializeToString())
    stored.unlink()
    assert torch.equal(LTXVideo(str(tmp_path)).encode(["a red circle"])["tokens"], expected)


def test_one_denoiser_and_two_experts_are_not_confused(wan_folder: Path, experts_folder: Path):
    with pytest.raises(ValueError, match="has 1 denoiser.* drives 2"):
        WanTwoExperts(str(wan_folder))
    with pytest.raises(ValueError, match="has 2 denoiser.* drives 1"):
        Wan(str(experts_folder))


def test_each_row_asks_the_expert_of_its_noise_level_with_its_own_guidance(experts_folder: Path):
    model = WanTwoExperts(str(experts_folder), max_sequence_length=16, guidance_2=3.0)
    cond = model.encode(["a", "b", "c"], ["", "d", ""])
    x = torch.randn(3, *model.latent_shape(32, 48, 5), generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.875, 0.8749, 0.99])  # the boundary itself belongs to the high-noise expert

    def alone(i: int, network: torch.nn.Module, guidance: float) -> torch.Tensor:
        t = torch.full((1,), 1000.0) * sigma[i]
        branches = (cond["neg.tokens"][i : i + 1], cond["tokens"][i : i + 1])
        negative, positive = (network(x[i : i + 1], t, tokens, return_dict=False)[0] for tokens in branches)
        return negative + guidance * (positive - negative)

    first, second = model.denoisers().values()
    with torch.no_grad():
        v = model.velocity(x, sigma, cond, 5.0)
        expected = torch.cat([alone(0, first, 5.0), alone(1, second, 3.0), alone(2, first, 5.0)])
        torch.testing.assert_close(v, expected, atol=3e-5, rtol=1e-4)
        unguided = Conditioning(tokens=cond["tokens"])
        off = model.velocity(x, sigma, cond, 1.0)
        torch.testing.assert_close(off, model.velocity(x, sigma, unguided, 1.0), atol=0, rtol=0)


def test_gradients_reach_the_experts_that_were_asked(experts_folder: Path):
    model = WanTwoExperts(str(experts_folder), max_sequence_length=16)
    first, second = (network.requires_grad_(True) for network in model.denoisers().values())
    x = torch.randn(2, *model.latent_shape(32, 48, 5), generator=torch.Generator().manual_seed(0))
    model.velocity(x, torch.tensor([0.5, 0.95]), model.encode(["a", "b"])).square().sum().backward()
    for network in (first, second):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.proj_out.parameters())


def test_an_expert_that_another_rank_asks_is_asked_here_too_and_changes_nothing(
    experts_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    model = WanTwoExperts(str(experts_folder), max_sequence_length=16)
    asked = {name: 0 for name in model.denoisers()}
    for name, network in model.denoisers().items():
        network.requires_grad_(True)
        network.register_forward_hook(lambda *_, name=name: asked.update({name: asked[name] + 1}))
    x = torch.randn(2, *model.latent_shape(32, 48, 5), generator=torch.Generator().manual_seed(0))
    cond, low = model.encode(["a", "b"]), torch.tensor([0.5, 0.2])

    def gradients() -> list[torch.Tensor | None]:
        for network in model.denoisers().values():
            network.zero_grad()
        v = model.velocity(x, low, cond)
        v.square().sum().backward()
        return [v.detach(), *(p.grad for network in model.denoisers().values() for p in network.parameters())]

    own = gradients()
    assert asked == {"transformer": 0, "transformer_2": 1}
    monkeypatch.setattr(model, "agree", lambda wanted: torch.ones_like(wanted))  # another rank wants both
    together = gradients()
    assert asked == {"transformer": 1, "transformer_2": 2}
    for mine, theirs in zip(own, together, strict=True):
        if mine is None:  # a gradient of zeros takes part in the mean over ranks
            assert theirs is not None
            assert not theirs.any()
        else:
            assert torch.equal(mine, theirs)


def test_settings_of_the_base_are_checked_through_those_of_a_family():
    node = {"_target_": "flowalign.models.wan.WanTwoExperts", "pretrained": "x", "guidance_2": 3.0, "variant": None}
    check_signatures({"model": node})
    with pytest.raises(ConfigError, match="no parameter train_dtyp; did you mean train_dtype"):
        check_signatures({"model": node | {"train_dtyp": "float32"}})
    with pytest.raises(ConfigError, match="max_sequence_length: expected"):
        check_signatures({"model": node | {"max_sequence_length": "many"}})
