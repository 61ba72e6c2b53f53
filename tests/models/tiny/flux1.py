"""FLUX.1 with random weights, with a shift that depends on the resolution."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import clip_config, clip_tokenizer, seeded, t5, t5_tokenizer, vae

PIPELINE = "FluxPipeline"
GUIDANCE = (1.0, 3.0)
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
    "guidance_embeds": True,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    return FluxPipeline(
        transformer=seeded(FluxTransformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=1024),
        vae=vae(),
        text_encoder=seeded(CLIPTextModel, clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": 3.5, "true_cfg_scale": guidance}
