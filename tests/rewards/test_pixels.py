"""Own picture processing beside transformers' processors of PIL pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.rewards.base import RewardError
from flowalign.rewards.drawings import drawings
from flowalign.rewards.pixels import ImageTransform, as_bytes, quantise, resize

NOISE = torch.rand(1, 3, 150, 203, generator=torch.Generator().manual_seed(0))
SMOOTH = resize(torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(1)), 150, 203)
TALL = drawings()[:1, :, :, 40:200]
PICTURES = {"noise": NOISE, "smooth": SMOOTH, "tall": TALL, "small": NOISE[..., :30, :40]}


def official(kind: str, picture: Tensor, **settings: Any) -> tuple[Tensor, dict[str, Any]]:
    """What the processor makes of the picture's PIL image, and how it describes itself."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    kinds = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil, "dino": BitImageProcessorPil}
    processor = kinds[kind](**settings)
    return processor(Image.fromarray(as_bytes(picture[0])), return_tensors="pt")["pixel_values"], processor.to_dict()


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("clip", {}),
        ("siglip", {"resample": 2}),
        ("siglip", {"size": {"height": 384, "width": 384}}),
        ("dino", {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.2, 0.3]}),
    ],
)
def test_pixels_are_those_of_the_official_processor(picture: str, kind: str, settings: dict[str, Any]):
    theirs, described = official(kind, PICTURES[picture], **settings)
    ours = ImageTransform.from_config(described, "x")(PICTURES[picture])
    assert ours.shape == theirs.shape
    steps = ((ours - theirs) * torch.tensor(described["image_std"]).view(3, 1, 1) * 255).abs()
    assert steps.max() < 1.01  # one of 256 levels: PIL computes with weights of 22 bits
    assert (steps > 0.01).float().mean() < 0.02


def test_sizes_in_the_older_form_are_read():
    older = {"size": 32, "crop_size": 28, "do_center_crop": True, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    assert ImageTransform.from_config(older, "x") == ImageTransform(
        (32, 32), "shortest", (28, 28), (0, 0, 0), (1, 1, 1)
    )


def test_a_whole_picture_gets_a_black_border():
    whole = ImageTransform((32, 32), "longest", mean=(0, 0, 0), std=(1, 1, 1))
    out = whole(torch.ones(1, 3, 20, 40))
    assert out.shape == (1, 3, 32, 32)
    assert out[:, :, 8:24].eq(1).all()
    assert out.sum() == 3 * 16 * 32


def test_pictures_are_judged_as_files_would_be():
    exact = torch.full((1, 3, 32, 32), 100.4 / 255)
    assert quantise(exact).mul(255).allclose(torch.tensor(100.0))
    assert resize(exact, 16, 16).mul(255).allclose(torch.tensor(100.0))


def test_an_unknown_processor_is_refused():
    with pytest.raises(RewardError, match=r"preprocessor_config.json of mine has an unknown format \('image_mean'\)"):
        ImageTransform.from_config({"size": 224}, "mine")
