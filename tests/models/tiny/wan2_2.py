"""Wan 2.2 text-to-video with random weights: two experts, the second of which has its own guidance."""

from __future__ import annotations

from typing import Any

from tests.models.tiny import wan2_1
from tests.models.tiny.parts import seeded
from tests.models.tiny.wan2_1 import FRAMES, GUIDANCE, PIPELINE, TRANSFORMER

__all__ = ["ADAPTER", "FRAMES", "GUIDANCE", "MODEL", "PIPELINE", "arguments", "build"]

ADAPTER = "WanTwoExperts"
MODEL = {"guidance_2": 3.0}


def build() -> Any:
    """The pipeline."""
    from diffusers import WanPipeline, WanTransformer3DModel

    second = seeded(WanTransformer3DModel, **TRANSFORMER, seed=1)
    return WanPipeline(**wan2_1.build().components | {"transformer_2": second}, boundary_ratio=0.875)


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance, "guidance_scale_2": MODEL["guidance_2"]}
