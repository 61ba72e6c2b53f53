"""Wan 2.1 image-to-video, with random weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.models.tiny import wan2_1
from tests.models.tiny.parts import pictures, seeded
from tests.models.tiny.wan2_1 import FRAMES, GUIDANCE, TRANSFORMER, arguments

__all__ = ["FRAMES", "GUIDANCE", "IMAGES", "PIPELINE", "arguments", "build", "patched"]

PIPELINE = "WanImageToVideoPipeline"
IMAGES = [pictures(1, 40, 64, seed=1), pictures(1, 32, 48, seed=2)]  # the first one is resized
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    seeing = TRANSFORMER | {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24}
    text_to_video = wan2_1.build().components
    del text_to_video["transformer_2"]
    return WanImageToVideoPipeline(
        **text_to_video | {"transformer": seeded(WanTransformer3DModel, **seeing)},
        image_encoder=seeded(CLIPVisionModel, CLIPVisionConfig(**CLIP)),
        image_processor=CLIPImageProcessor(size=32, crop_size=32),
    )


def patched() -> AbstractContextManager[Any]:
    """The pipeline calls ftfy even if it is not installed."""
    stub = SimpleNamespace(fix_text=lambda text: text)
    return patch("diffusers.pipelines.wan.pipeline_wan_i2v.ftfy", stub, create=True)
