"""Qwen-Image-Edit-Plus with random weights and two reference images."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from tests.models.tiny import qwen_image
from tests.models.tiny.parts import pictures
from tests.models.tiny.qwen_image import GUIDANCE, arguments

__all__ = ["CALL", "GUIDANCE", "IMAGES", "MODEL", "PIPELINE", "SIZE", "arguments", "build", "equip", "patched"]

PIPELINE = "QwenImageEditPlusPipeline"
SIZE = (32, 64)
IMAGES = [pictures(2, *SIZE, seed=1), pictures(2, *SIZE, seed=2)]
CALL = {"max_sequence_length": 512}
MODEL = CALL | {"absent": ["processor"]}


def build() -> Any:
    """The pipeline, without the processor."""
    from diffusers import QwenImageEditPlusPipeline

    return QwenImageEditPlusPipeline(**qwen_image.build().components, processor=None)  # type: ignore


def equip(pipe: Any) -> None:
    """Add a processor for images; the published one needs torchvision, for videos."""
    pipe.register_modules(processor=Processor(pipe.tokenizer))


class Processor:
    """Expands each image placeholder in the text to the number of vision patches."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import Qwen2VLImageProcessorPil

        self.tokenizer = tokenizer
        self.eyes = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)

    def __call__(self, text: list[str], images: list[Any], **settings: Any) -> Any:
        from transformers import BatchFeature

        seen = self.eyes(images, return_tensors="pt")
        first, *others = text[0].split("<|image_pad|>")
        counts = seen["image_grid_thw"].prod(dim=1) // 4
        parts = ["<|image_pad|>" * int(n) + other for n, other in zip(counts, others, strict=True)]
        return BatchFeature({**self.tokenizer([first + "".join(parts)], **settings), **seen})


def patched() -> AbstractContextManager[Any]:
    """The pipeline resizes reference images to this many pixels."""
    return patch("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE", SIZE[0] * SIZE[1])
