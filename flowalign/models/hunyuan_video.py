"""HunyuanVideo, text-to-video (HunyuanVideoPipeline): guidance-distilled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.video import VideoModel
from flowalign.types import Conditioning


class HunyuanVideo(VideoModel):
    """`embedded_guidance` is the pipeline's guidance_scale; `guidance` is its true_cfg_scale, usually off."""

    pipeline = "HunyuanVideoPipeline"
    default_max_sequence_length = 256
    default_embedded_guidance = 6.0
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def text(self, texts: Sequence[str]) -> Conditioning:
        settings = {"max_sequence_length": self.max_sequence_length, "device": self.device}
        tokens, pooled, mask = self.pipe.encode_prompt(list(texts), **settings)
        return Conditioning({"tokens": tokens, "pooled": pooled, "mask": mask})

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype = transformer.dtype
        return transformer(
            hidden_states=x.to(dtype),
            timestep=t,
            encoder_hidden_states=branch["tokens"].to(dtype),
            encoder_attention_mask=branch["mask"].to(dtype),
            pooled_projections=branch["pooled"].to(dtype),
            # Multiplied in the network's dtype, as in the pipeline: bfloat16 makes 6016 of 6.
            guidance=1000 * torch.full_like(t, self.embedded_guidance, dtype=dtype),
            return_dict=False,
        )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        return x / self.pipe.vae.config.scaling_factor

    def normalised(self, z: Tensor) -> Tensor:
        return z * self.pipe.vae.config.scaling_factor
