"""Stable Diffusion 3 with two CLIPs and a T5, with random weights."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import clip_config, clip_tokenizer, seeded, t5, t5_tokenizer, vae

PIPELINE = "StableDiffusion3Pipeline"
GUIDANCE = (1.0, 5.0)
TRANSFORMER = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 32,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    clips = [seeded(CLIPTextModelWithProjection, clip_config(), seed=seed) for seed in (1, 2)]
    return StableDiffusion3Pipeline(
        transformer=seeded(SD3Transformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=clips[0],
        tokenizer=clip_tokenizer(),
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(64),
        tokenizer_3=t5_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
