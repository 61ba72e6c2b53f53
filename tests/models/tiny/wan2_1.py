"""Wan 2.1 text-to-video with random weights."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import seeded, t5, t5_tokenizer, wan_vae

PIPELINE = "WanPipeline"
FRAMES = 9
GUIDANCE = (1.0, 5.0)
TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def build() -> Any:
    """The pipeline, with the Euler scheduler instead of UniPC."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    return WanPipeline(
        transformer=seeded(WanTransformer3DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=wan_vae(),
        text_encoder=t5(umt5=True),
        tokenizer=t5_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
