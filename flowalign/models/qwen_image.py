"""Qwen-Image (QwenImagePipeline): prompts of varying length, and guidance that preserves the norm of each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import FlowModel
from flowalign.models.latents import channel_statistics, pack, unpack
from flowalign.types import Conditioning


class QwenImage(FlowModel):
    """`guidance` is the pipeline's true_cfg_scale. The VAE is a video VAE, used on single frames."""

    pipeline = "QwenImagePipeline"
    default_max_sequence_length = 512
    one_text_length = False
    vae_in_3d = True
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @property
    def latent_channels(self) -> int:
        return self.pipe.transformer.config.in_channels // 4

    def text(self, texts: Sequence[str]) -> Conditioning:
        length = self.max_sequence_length
        tokens, mask = self.pipe.encode_prompt(list(texts), self.device, max_sequence_length=length)
        return Conditioning(
            tokens=tokens, mask=torch.ones_like(tokens[..., 0], dtype=torch.long) if mask is None else mask
        )

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype, (height, width) = transformer.dtype, x.shape[2:]
        mask = branch["mask"]
        parts = [x, *self.reference_latents(branch)]
        v = transformer(
            hidden_states=torch.cat([pack(part) for part in parts], dim=1).to(dtype),
            timestep=t / 1000,
            encoder_hidden_states=branch["tokens"].to(dtype),
            encoder_hidden_states_mask=None if mask.all() else mask,  # as the pipeline does; attention is then faster
            img_shapes=[[(1, part.shape[2] // 2, part.shape[3] // 2) for part in parts]] * len(x),
            return_dict=False,
        )[0]
        return unpack(v[:, : height * width // 4], height, width)

    def reference_latents(self, branch: Conditioning) -> list[Tensor]:
        """Latents (B, C, H, W) of reference images, appended to x as tokens."""
        del branch
        return []

    def guide(self, v_negative: Tensor, v_positive: Tensor, guidance: float) -> Tensor:
        guided = pack(super().guide(v_negative, v_positive, guidance))
        norm = pack(v_positive).norm(dim=-1, keepdim=True)
        return unpack(guided * (norm / guided.norm(dim=-1, keepdim=True)), *v_positive.shape[2:])

    def denormalised(self, x: Tensor) -> Tensor:
        mean, std = channel_statistics(self.pipe.vae.config, x)
        return x * std + mean

    def normalised(self, z: Tensor) -> Tensor:
        mean, std = channel_statistics(self.pipe.vae.config, z)
        return (z - mean) / std

    def decode(self, x: Tensor) -> Tensor:
        return super().decode(x[:, :, None])[:, :, 0]

    def encode_images(self, media: Tensor) -> Tensor:
        return super().encode_images(media[:, :, None])[:, :, 0]
