"""HunyuanVideo with random weights."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import clip_config, clip_tokenizer, qwen_tokenizer, seeded

PIPELINE = "HunyuanVideoPipeline"
FRAMES = 9
GUIDANCE = (1.0, 3.0)
# Bytes are tokens here, and of the pipeline's long template before the prompt only 95 are cut off.
MODEL = CALL = {"max_sequence_length": 448}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (2, 4, 4),
}
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (4, 4, 4, 4),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 264,
    "pad_token_id": 256,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextModel, LlamaConfig, LlamaModel

    return HunyuanVideoPipeline(
        transformer=seeded(HunyuanVideoTransformer3DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=seeded(AutoencoderKLHunyuanVideo, **VAE),
        text_encoder=seeded(LlamaModel, LlamaConfig(**LLAMA)),
        tokenizer=qwen_tokenizer(),
        text_encoder_2=seeded(CLIPTextModel, clip_config()),
        tokenizer_2=clip_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": 6.0, "true_cfg_scale": guidance}
