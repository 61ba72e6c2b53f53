"""A complete random Stable Diffusion 3, small enough to measure on a CPU without downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.models.tiny.parts import clip_config, clip_tokenizer, seeded, t5, t5_tokenizer

TOKENS = 32
"""Text tokens of the CLIPs and of T5 each; an image of 64 × 64 has 64 more."""
SIZES = {"8M": (6, 6), "30M": (10, 9), "100M": (11, 16)}
"""Layers, and heads of dimension 32: widths 192, 288 and 512."""


def normal(module: torch.nn.Module) -> Any:
    """Initialise the matrices of a module from a normal distribution of standard deviation 0.02."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02, generator=generator)
    return module.eval()


def transformer(layers: int, heads: int) -> Any:
    from diffusers import SD3Transformer2DModel

    return normal(
        SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=64,
            caption_projection_dim=32 * heads,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
            qk_norm="rms_norm",
        )
    )


def vae() -> Any:
    """A VAE from images of 64 × 64 to latents of 16 × 16 × 16."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.0,
    }
    return normal(AutoencoderKL(**config))


def write(size: tuple[int, int], folder: Path) -> Path:
    """Save the pipeline in diffusers layout; size: layers, and heads of dimension 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = TOKENS
    StableDiffusion3Pipeline(
        transformer=transformer(*size),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=seeded(CLIPTextModelWithProjection, clip_config(), seed=1),
        tokenizer=tokenizer,
        text_encoder_2=seeded(CLIPTextModelWithProjection, clip_config(), seed=2),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(64),
        tokenizer_3=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def random_sd3(size: tuple[int, int], folder: Path) -> list[str]:
    """Write a random pipeline and return the overrides that select it."""
    return [f"model.pretrained={write(size, folder)}", "model.absent=[]", f"model.max_sequence_length={TOKENS}"]
