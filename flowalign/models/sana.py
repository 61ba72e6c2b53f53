"""Sana (SanaPipeline): a VAE of compression 32, and a long instruction before each prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import NEGATIVE, FlowModel
from flowalign.types import Conditioning


class Sana(FlowModel):
    """Only the shift of its DPM-Solver++ scheduler is used. Sizes are not rounded to the pipeline's resolution bins."""

    pipeline = "SanaPipeline"
    evenly = False
    takes_attention_backend = False
    default_max_sequence_length = 300
    default_lora_targets = ("to_q", "to_k", "to_v")

    @property
    def size_multiple(self) -> int:
        return self.pipe.vae_scale_factor

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        call = inspect.signature(self.pipe.__call__).parameters
        tokens, mask, negative_tokens, negative_mask = self.pipe.encode_prompt(
            list(prompts),
            negatives is not None,
            negative_prompt=list(negatives or []),
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=call["complex_human_instruction"].default,
        )
        cond = Conditioning(tokens=tokens, mask=mask)
        if negatives is not None:
            cond |= {f"{NEGATIVE}tokens": negative_tokens, f"{NEGATIVE}mask": negative_mask}
        return cond

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype = transformer.dtype
        return transformer(
            x.to(dtype),
            encoder_hidden_states=branch["tokens"].to(dtype),
            encoder_attention_mask=branch["mask"],
            timestep=t * transformer.config.timestep_scale,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_images(self, media: Tensor) -> Tensor:
        vae = self.pipe.vae  # a deterministic autoencoder: it returns a latent, not a distribution
        return self.normalised(vae.encode((2 * media - 1).to(vae.dtype), return_dict=False)[0].float())
