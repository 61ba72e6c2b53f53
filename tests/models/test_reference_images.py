"""Reference images: their number, their size and their encoding."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from flowalign.checks import ConfigError
from flowalign.models.base import FlowModel
from flowalign.models.flux1 import Flux1
from flowalign.models.flux1_kontext import Flux1Kontext
from flowalign.models.qwen_edit import QwenImageEdit
from flowalign.models.reference_images import pil_images
from flowalign.models.wan_i2v import WanImageToVideo
from flowalign.types import Conditioning
from tests.models.tiny import flux1_kontext, qwen_edit, wan2_1_i2v
from tests.models.tiny.parts import pictures

if TYPE_CHECKING:
    from omegaconf import DictConfig

SEEN = [pictures(1, 40, 64, seed=3)]


@pytest.fixture(scope="module")
def kontext(tmp_path_factory: pytest.TempPathFactory) -> Flux1Kontext:
    folder = tmp_path_factory.mktemp("kontext")
    flux1_kontext.build().save_pretrained(folder)
    return Flux1Kontext(str(folder), max_sequence_length=16)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> WanImageToVideo:
    folder = tmp_path_factory.mktemp("wan2_1_i2v")
    wan2_1_i2v.build().save_pretrained(folder)
    return WanImageToVideo(str(folder), max_sequence_length=16)


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> QwenImageEdit:
    folder = tmp_path_factory.mktemp("qwen_edit")
    qwen_edit.build().save_pretrained(folder)
    model = QwenImageEdit(str(folder), absent=["processor"])
    qwen_edit.equip(model.pipe)
    return model


@pytest.fixture(params=["kontext", "wan"])
def model(request: pytest.FixtureRequest) -> FlowModel:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("images", [None, [], SEEN * 2, [pictures(2, 32, 48, seed=0)], [torch.zeros(0, 3, 32, 48)]])
def test_a_wrong_number_of_pictures_is_refused(model: FlowModel, images: list[torch.Tensor] | None):
    with pytest.raises(ValueError, match="needs one image with each prompt: 1 prompt"):
        model.encode(["a"], None, images, (32, 48, 9))


def test_a_picture_without_the_size_to_be_made_is_refused(model: FlowModel):
    with pytest.raises(ValueError, match="give size="):
        model.encode(["a"], None, SEEN)


def test_another_vae_is_another_encoding(tmp_path: Path):
    flux1_kontext.build().save_pretrained(tmp_path)
    sees, reads = Flux1Kontext(str(tmp_path), max_sequence_length=16), Flux1.__new__(Flux1)
    before = sees.text_fingerprint()
    reads.__dict__ |= sees.__dict__
    weights, unread = tmp_path / "vae" / "diffusion_pytorch_model.safetensors", reads.text_fingerprint()
    os.utime(weights, ns=(0, 0))
    assert sees.text_fingerprint() != before
    assert reads.text_fingerprint() == unread  # a family that reads only text keeps its encodings


def test_pictures_reach_the_pipeline_to_the_bit(kontext: Flux1Kontext):
    ((picture,),) = pil_images(kontext, ["a"], SEEN, at_most=1)
    assert picture.tobytes() == (SEEN[0][0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()


def test_a_picture_is_brought_to_the_size_that_is_made(kontext: Flux1Kontext):
    seen = kontext.encode(["a"], None, SEEN, (32, 48, None))["cond.picture"]
    assert seen.shape == (1, *kontext.latent_shape(32, 48))
    ((picture,),) = pil_images(kontext, ["a"], SEEN, at_most=1)
    resized = torch.frombuffer(
        bytearray(picture.resize((48, 32), Image.Resampling.LANCZOS).tobytes()), dtype=torch.uint8
    )
    media = resized.view(1, 32, 48, 3).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(seen, kontext.encode_images(media), atol=1e-5, rtol=0)


def test_pictures_are_what_both_branches_share(model: FlowModel):
    cond = model.encode(["a"], ["b"], SEEN, (32, 48, 9))
    assert {key for key in cond if key.startswith("cond.")}
    assert not {key for key in cond if key.startswith("neg.cond.")}


def test_encoding_a_first_picture_draws_no_noise(wan: WanImageToVideo):
    before = torch.get_rng_state()
    wan.encode(["a"], None, SEEN, (32, 48, 9))
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_with_other_numbers_of_pictures_are_not_joined(edit: QwenImageEdit):
    one, two = (edit.encode(["a"], None, [pictures(n, 32, 64, seed=n)], (32, 64, None)) for n in (1, 2))
    with pytest.raises(ValueError, match="cond.picture1.* differ"):
        Conditioning.cat([one, two])
    with pytest.raises(ValueError, match="needs 1 to 3 images"):
        edit.encode(["a"], None, [pictures(4, 32, 64, seed=0)], (32, 64, None))


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((1, 2), r"edits.jsonl:2: the number of images is 2, and 1 in .*edits.jsonl:1: all prompts"),
        ((4, 4), r"edits.jsonl:1: 4 images, and this model takes at most 3"),
        ((1, 0), r"edits.jsonl:2: this model takes input images: give every line an `image`"),
    ],
)
def test_the_pictures_of_every_prompt_are_counted_before_the_run(
    tmp_path: Path, compose: Callable[..., DictConfig], edit: QwenImageEdit, numbers: tuple[int, ...], sentence: str
):
    from flowalign.module import AlignModule
    from flowalign.run import build_recipe

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [json.dumps({"prompt": f"to {i}", "images": ["a.png"] * number}) for i, number in enumerate(numbers)]
    (tmp_path / "edits.jsonl").write_text("\n".join(lines))
    files = [f"data.{stage}.path={tmp_path}/edits.jsonl" for stage in ("train", "val", "test")]
    recipe = build_recipe(compose("reward=jpeg", "data=folder", *files))
    with pytest.raises(ConfigError, match=sentence):
        AlignModule(replace(recipe, model=edit))


def test_the_order_of_pictures_matters(edit: QwenImageEdit):
    seen = pictures(2, 32, 64, seed=0)
    x = torch.randn(1, *edit.latent_shape(32, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (edit.velocity(x, 0.5, edit.encode(["a"], None, [s], (32, 64, None))) for s in (seen, seen.flip(0)))
    assert (a - b).abs().max() > 1e-3
