"""Rewards that compare the embeddings of picture and prompt, on small random networks in folders."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.rewards.base import RewardError
from flowalign.rewards.clip_score import ClipScore
from flowalign.rewards.embedding import TextImage
from flowalign.rewards.pickscore import PickScore
from flowalign.rewards.siglip2 import Siglip2
from tests.rewards.tiny import PICTURES, PROMPTS, called, clip, rig_text, siglip

MAKERS: dict[str, tuple[Callable[..., TextImage], Callable[[Path], Path]]] = {
    "clip_score": (ClipScore, clip),
    "pickscore": (lambda folder, **rest: PickScore(folder, processor=None, **rest), clip),
    "siglip2": (Siglip2, siglip),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(build(tmp_path_factory.mktemp(name))) for name, (_, build) in MAKERS.items()}


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest, folders: dict[str, str]) -> Callable[..., TextImage]:
    reward = MAKERS[request.param][0]
    return lambda **rest: reward(folders[request.param], **rest)


def test_clip_score_is_the_cosine_that_the_official_model_and_processor_give(folders: dict[str, str]):
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from flowalign.rewards.pixels import as_bytes

    model = CLIPModel.from_pretrained(folders["clip_score"]).eval()
    images = [Image.fromarray(as_bytes(picture)) for picture in PICTURES]
    pixels = CLIPImageProcessorPil.from_pretrained(folders["clip_score"])(images, return_tensors="pt")
    words = CLIPTokenizer.from_pretrained(folders["clip_score"])(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels, **words).logits_per_image.diagonal()
    scale = model.logit_scale.exp()
    assert called(ClipScore(folders["clip_score"])).allclose(logits / scale, atol=2e-4)
    assert called(PickScore(folders["clip_score"], processor=None)).allclose(logits, atol=2e-4 * scale.item())


def test_siglip_is_the_cosine_that_the_official_model_gives(folders: dict[str, str]):
    from transformers import AutoTokenizer, SiglipModel

    model = SiglipModel.from_pretrained(folders["siglip2"]).eval()
    words = AutoTokenizer.from_pretrained(folders["siglip2"])(
        [prompt.lower() for prompt in PROMPTS], padding="max_length", max_length=64, return_tensors="pt"
    )
    reward = Siglip2(folders["siglip2"])
    with torch.no_grad():
        out = model(input_ids=words["input_ids"], pixel_values=reward.transform(PICTURES))
    assert called(reward).allclose((out.image_embeds * out.text_embeds).sum(dim=1), atol=1e-5)
    assert called(reward, prompts=[prompt.upper() for prompt in PROMPTS]).equal(called(reward))


def test_a_score_depends_on_its_own_picture_and_prompt_only(make: Callable[..., TextImage]):
    whole = called(make(batch_size=5))
    assert whole.shape == (5,)
    assert whole.std() > 0
    for size in (1, 2):
        assert called(make(batch_size=size)).allclose(whole, rtol=1e-5, atol=1e-6)
    assert called(make(), PICTURES.flip(0), PROMPTS[::-1]).allclose(whole.flip(0), rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_cannot_be_scored_and_leaves_the_others(make: Callable[..., TextImage]):
    broken = PICTURES.clone()
    broken[1, 0, 0, 0] = torch.inf
    scores = called(make(), broken)
    assert scores.isnan().tolist() == [False, True, False, False, False]
    assert scores[[0, 2, 3, 4]].allclose(called(make())[[0, 2, 3, 4]], rtol=1e-5, atol=1e-6)


def test_the_precision_of_a_rollout_does_not_reach_the_scores(make: Callable[..., TextImage]):
    reward = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert called(reward).equal(called(make()))
    half = called(make(dtype="bfloat16"))
    assert half.dtype == torch.float32
    assert half.allclose(called(reward), rtol=0.1, atol=0.05)


def test_a_long_prompt_is_cut_and_that_is_said_once(make: Callable[..., TextImage], caplog: pytest.LogCaptureFixture):
    reward = make()
    with caplog.at_level(logging.WARNING):
        first = called(reward, prompts=["x" * 200] * 5)
        second = called(reward, prompts=["x" * 300] * 5)
    assert first.equal(second)
    (said,) = [record.message for record in caplog.records if "are truncated" in record.message]
    assert re.search(r"reads (64|77) tokens of a prompt; longer ones \(here 202\) are truncated", said)


def test_self_check_refuses_random_weights_and_passes_those_that_match(make: Callable[..., TextImage]):
    reward = make(device="cpu")
    with pytest.raises(RewardError, match=r"prefers the drawing that its caption describes in \d of 4 known cases"):
        reward.self_check()
    rig_text(reward)
    reward.self_check()


def test_weights_that_are_missing_are_not_made_up(folders: dict[str, str], tmp_path: Path):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    folder = Path(copytree(folders["clip_score"], tmp_path / "less"))
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"is not a CLIPModel: it lacks 1 weights, such as visual_projection.weight"):
        called(ClipScore(str(folder)))


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("./nowhere", "neither a folder nor a hub id"),
        ("someone/who-is-not-there", "not in the local cache, and the hub did not give it"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(where: str, sentence: str):
    with pytest.raises(RewardError, match=sentence):
        ClipScore(where).self_check()


@pytest.mark.parametrize(
    ("settings", "sentence"), [({"dtype": "float8"}, "one of float32, bfloat16"), ({"batch_size": 0}, "at least 1")]
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        ClipScore(**settings)
