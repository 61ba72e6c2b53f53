"""FLUX.1 Kontext with random weights."""

from __future__ import annotations

from typing import Any

from tests.models.tiny import flux1
from tests.models.tiny.flux1 import GUIDANCE
from tests.models.tiny.parts import pictures

__all__ = ["GUIDANCE", "IMAGES", "PIPELINE", "arguments", "build"]

PIPELINE = "FluxKontextPipeline"
IMAGES = [pictures(1, 32, 48, seed=1), pictures(1, 32, 48, seed=2)]


def build() -> Any:
    """The pipeline."""
    from diffusers import FluxKontextPipeline

    names = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = flux1.build().components
    return FluxKontextPipeline(**{name: parts[name] for name in names})


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance and output size."""
    return flux1.arguments(guidance) | {"max_area": 32 * 48, "_auto_resize": False}
