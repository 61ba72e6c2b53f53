"""Pipelines of the published sizes with random weights, to measure their cost without downloading them.

Text encoders are small, with outputs as wide as the transformers expect. Weights are created on the device in the
given dtype, since moving a 12-billion-parameter network there would take long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models.tiny.parts import clip_config, clip_tokenizer, t5_tokenizer

VAE_16 = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SD3_5_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX1_DEV = {"guidance_embeds": True}  # the other defaults of the class are those of FLUX.1
WAN2_1_1_3B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}  # here those of the 14-billion model


def made(kind: Callable[..., nn.Module], *args: Any, device: torch.device, dtype: torch.dtype, **config: Any) -> Any:
    """A network with normal weights of standard deviation 0.02, such that bfloat16 activations stay finite."""
    with torch.device("meta"):
        network = kind(*args, **config)
    network = network.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if not tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))  # position ids
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.02, generator=generator)
            else:
                tensor.fill_(0 if name.endswith("bias") else 1)
    return network.eval()


def _t5(kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    sizes = {"vocab_size": 128, "d_model": 4096, "d_kv": 64, "d_ff": 256, "num_layers": 1, "num_heads": 4}
    return made(kind, config(**sizes), device=device, dtype=dtype)


def _clip(kind: Any, width: int, device: torch.device, dtype: torch.dtype) -> Any:
    config = clip_config()
    config.projection_dim = width
    if not kind.__name__.endswith("Projection"):  # the pooled output is as wide as the encoder
        config.hidden_size = width
    return made(kind, config, device=device, dtype=dtype)


def sd3_5_medium(device: torch.device, dtype: torch.dtype) -> Any:
    """Stable Diffusion 3.5 Medium, 2.2 billion parameters."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    where = {"device": device, "dtype": dtype}
    return StableDiffusion3Pipeline(
        transformer=made(SD3Transformer2DModel, **SD3_5_MEDIUM, **where),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=made(AutoencoderKL, **VAE_16, scaling_factor=1.5305, shift_factor=0.0609, **where),
        text_encoder=_clip(CLIPTextModelWithProjection, 768, **where),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection, 1280, **where),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(T5EncoderModel, T5Config, **where),
        tokenizer_3=t5_tokenizer(),
    )


def flux1_dev(device: torch.device, dtype: torch.dtype) -> Any:
    """FLUX.1 [dev], 12 billion parameters."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    where = {"device": device, "dtype": dtype}
    return FluxPipeline(
        transformer=made(FluxTransformer2DModel, **FLUX1_DEV, **where),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=made(AutoencoderKL, **VAE_16, scaling_factor=0.3611, shift_factor=0.1159, **where),
        text_encoder=_clip(CLIPTextModel, 768, **where),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(T5EncoderModel, T5Config, **where),
        tokenizer_2=t5_tokenizer(),
    )


def wan2_1_t2v(device: torch.device, dtype: torch.dtype) -> Any:
    """Wan 2.1 text-to-video, 1.3 billion parameters."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    where = {"device": device, "dtype": dtype}
    return WanPipeline(
        transformer=made(WanTransformer3DModel, **WAN2_1_1_3B, **where),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=made(AutoencoderKLWan, **where),
        text_encoder=_t5(UMT5EncoderModel, UMT5Config, **where),
        tokenizer=t5_tokenizer(),
    )
