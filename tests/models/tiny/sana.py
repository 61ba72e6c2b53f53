"""Sana with random weights, with the scheduler that stands in for its multistep one."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import gemma2, qwen_tokenizer, seeded

PIPELINE = "SanaPipeline"
GUIDANCE = (1.0, 4.5)
SIZE = (32, 64)  # its call wants multiples of 32
MODEL = {"max_sequence_length": 40}  # letters are tokens here, and these prompts are to end before that
CALL = MODEL | {"use_resolution_binning": False}
TRANSFORMER = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "timestep_scale": 0.9,
}
VAE = {
    "latent_channels": 4,
    "attention_head_dim": 2,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "scaling_factor": 0.41407,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    stand_in: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(
        transformer=seeded(SanaTransformer2DModel, **TRANSFORMER),
        scheduler=stand_in,
        vae=seeded(AutoencoderDC, **VAE),
        text_encoder=gemma2(),
        tokenizer=qwen_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
