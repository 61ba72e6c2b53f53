"""Likeness to a given picture, on a small random DINOv2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from flowalign.rewards.base import RewardError
from flowalign.rewards.dino import DinoSimilarity, shuffle_tiles
from flowalign.rewards.drawings import drawings
from flowalign.rewards.pixels import as_bytes, quantise
from tests.models.tiny.parts import seeded
from tests.rewards.tiny import PICTURES, called, write_processor

if TYPE_CHECKING:
    from omegaconf import DictConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    seeded(Dinov2Model, Dinov2Config(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    write_processor(folder)
    for number in range(2):
        Image.fromarray(as_bytes(PICTURES[number])).save(folder / f"{number}.png")
    return folder


def test_a_copy_is_most_alike_and_the_others_are_cosines_of_class_tokens(folder: Path):
    from transformers import Dinov2Model

    reward = DinoSimilarity(str(folder), folder=str(folder))
    scores = called(reward, quantise(PICTURES), image="0.png")
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(folder).eval()(reward.transform(PICTURES)).pooler_output
    assert scores.allclose(normalize(hidden) @ normalize(hidden)[0], atol=1e-5)
    assert scores[0] == pytest.approx(1)
    assert scores.argmax() == 0
    assert called(DinoSimilarity(str(folder), folder=str(folder), batch_size=2), image=["0.png"]).allclose(
        called(reward, image="0.png"), atol=1e-6
    )


def test_every_line_has_its_own_picture(folder: Path):
    reward = DinoSimilarity(str(folder), key="before", folder=str(folder))
    lines = [{"before": "0.png"}, {"before": "1.png"}]
    assert reward(quantise(PICTURES[:2]), ["", ""], lines).allclose(torch.ones(2))
    assert reward(quantise(PICTURES[:2]), ["", ""], lines[::-1]).max() < 1 - 1e-4


@pytest.mark.parametrize(
    ("entry", "sentence"), [({}, "needs a file under 'image'"), ({"image": "9.png"}, "cannot be read")]
)
def test_a_picture_that_is_not_there_is_an_error(folder: Path, entry: dict[str, str], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        called(DinoSimilarity(str(folder), folder=str(folder)), **entry)
    with pytest.raises(ValueError, match="needs a file under 'image'|there is no image"):
        DinoSimilarity(str(folder), folder=str(folder)).check_prompt("", entry)


def test_pictures_are_looked_up_beside_the_prompts(compose: Callable[..., DictConfig]):
    assert compose("reward=dino", "data=folder", "data.folder=my_prompts").reward.objective.folder == "my_prompts"
    assert compose("reward=dino").reward.objective.folder is None  # the scenes world has no folder


def test_self_check_refuses_a_random_network_and_passes_one_that_sees_shapes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    reward = DinoSimilarity(str(folder))
    with pytest.raises(RewardError, match=r"shuffled pieces in [01] of 4 known cases"):
        reward.self_check()

    def outlines(self: DinoSimilarity, pictures: Tensor) -> Tensor:
        contrast = pictures.mean(dim=1) - pictures.mean(dim=(1, 2, 3), keepdim=True)[:, 0]
        return normalize(contrast.flatten(1), dim=-1)

    monkeypatch.setattr(DinoSimilarity, "embed", outlines)
    reward.self_check()


def test_shuffled_keeps_all_pixels():
    before, after = drawings(), shuffle_tiles(drawings())
    assert before.shape == after.shape
    assert not before.equal(after)
    assert before.flatten(2).sort().values.equal(after.flatten(2).sort().values)
