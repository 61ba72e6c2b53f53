"""LTX-Video with random weights, with a shift that depends on the resolution and a timestep-conditioned decoder."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import seeded, t5, t5_tokenizer

PIPELINE = "LTXPipeline"
FRAMES, SIZE = 17, (64, 96)
GUIDANCE = (1.0, 3.0)
MODEL = CALL = {"frame_rate": 20.0}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": 32,
}
VAE: dict[str, Any] = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "timestep_conditioning": True,
    "scaling_factor": 1.2,
}


def build() -> Any:
    """The pipeline."""
    import torch
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    vae = seeded(AutoencoderKLLTXVideo, **VAE)
    vae.latents_mean += torch.linspace(-0.3, 0.3, 8)
    vae.latents_std *= torch.linspace(0.8, 1.2, 8)
    shift = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64, "shift_terminal": 0.1}
    return LTXPipeline(
        transformer=seeded(LTXVideoTransformer3DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift, base_shift=0.95, max_shift=2.05),
        vae=vae,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
