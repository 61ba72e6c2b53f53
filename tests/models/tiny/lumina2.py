"""Lumina-Image 2.0 with random weights."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import gemma2, qwen_tokenizer, seeded, vae

PIPELINE = "Lumina2Pipeline"
GUIDANCE = (1.0, 4.0)
MODEL = CALL = {"max_sequence_length": 256}  # letters are tokens here, and the system's message has some 150
TRANSFORMER = {
    "sample_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "axes_dim_rope": (8, 4, 4),
    "axes_lens": (300, 32, 32),
    "cap_feat_dim": 16,
}
FACTOR_8: dict[str, Any] = {  # which is written into the pipeline
    "block_out_channels": (4, 4, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    return Lumina2Pipeline(
        transformer=seeded(Lumina2Transformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(**FACTOR_8),
        text_encoder=gemma2(),
        tokenizer=qwen_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
