"""AuraFlow (AuraFlowPipeline): time is sigma; padding tokens are zeros rather than masked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import NEGATIVE, FlowModel
from flowalign.types import Conditioning


class AuraFlow(FlowModel):
    """The scheduler spaces the sigmas itself; the network predicts v."""

    pipeline = "AuraFlowPipeline"
    evenly = False
    takes_attention_backend = False
    default_max_sequence_length = 256
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        config = self.pipe.transformer.config
        limit = math.isqrt(config.pos_embed_max_size) * config.patch_size * self.pipe.vae_scale_factor
        if max(height, width) > limit:
            raise ValueError(f"this model has positions for pictures up to {limit}×{limit} (got {height}×{width}).")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        tokens, _, negative_tokens, _ = self.pipe.encode_prompt(
            list(prompts),
            list(negatives or []),
            negatives is not None,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        cond = Conditioning(tokens=tokens)
        if negatives is not None:
            cond[f"{NEGATIVE}tokens"] = negative_tokens
        return cond

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype = transformer.dtype
        return transformer(
            x.to(dtype),
            encoder_hidden_states=branch["tokens"].to(dtype),
            timestep=t / 1000,
            return_dict=False,
        )[0]
