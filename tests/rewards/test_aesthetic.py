"""The aesthetic head on a small random CLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from flowalign.rewards.aesthetic import Aesthetic
from flowalign.rewards.base import RewardError
from tests.rewards.tiny import PICTURES, called, clip

WIDTHS = {0: (16, 24), 2: (12, 16), 4: (8, 12), 6: (4, 8), 7: (1, 4)}
"""Layers that the published head has among its dropouts; here smaller."""


def head(rating: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, shape in WIDTHS.items():
        state[f"layers.{number}.weight"] = 0.3 * torch.randn(*shape, generator=generator)
        state[f"layers.{number}.bias"] = torch.full((shape[0],), rating if number == 7 else 0.0)
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = clip(tmp_path_factory.mktemp("aesthetic"))
    torch.save(head(), folder / "random.pth")
    torch.save(head(5.5), folder / "rated.pth")
    save_file(head(5.5), folder / "rated.safetensors")
    return folder


def aesthetic(folder: Path, file: str = "rated.pth", **rest: int) -> Aesthetic:
    return Aesthetic(str(folder), head=str(folder), head_file=file, **rest)


def test_the_rating_is_linear_in_the_normalised_embedding(folder: Path):
    from transformers import CLIPModel

    reward = aesthetic(folder)
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        seen = model.vision_model(pixel_values=reward.transform(PICTURES)).pooler_output
        x = normalize(model.visual_projection(seen))
    for number in WIDTHS:
        x = x @ head(5.5)[f"layers.{number}.weight"].T + head(5.5)[f"layers.{number}.bias"]
    assert called(reward).allclose(x[:, 0], atol=1e-5)
    assert called(aesthetic(folder, batch_size=2)).allclose(x[:, 0], atol=1e-5)
    assert called(aesthetic(folder, "rated.safetensors")).equal(called(reward))


def test_self_check_knows_the_scale_of_ratings(folder: Path):
    aesthetic(folder).self_check()
    with pytest.raises(RewardError, match="head or network are not the published ones"):
        aesthetic(folder, "random.pth").self_check()


def test_another_head_is_refused(folder: Path):
    torch.save({"layers.0.weight": torch.zeros(1, 1)}, folder / "other.pth")
    with pytest.raises(RewardError, match="holds no head of linear layers"):
        called(aesthetic(folder, "other.pth"))
    with pytest.raises(RewardError, match=r"has no none.pth"):
        called(aesthetic(folder, "none.pth"))
