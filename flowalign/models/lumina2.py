"""Lumina-Image 2.0 (Lumina2Pipeline): time is 1 - sigma, and the network predicts -v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import NEGATIVE, FlowModel
from flowalign.types import Conditioning


class Lumina2(FlowModel):
    """Guidance preserves the norm of each row of each latent channel, as the pipeline does by default."""

    pipeline = "Lumina2Pipeline"
    takes_attention_backend = False
    default_max_sequence_length = 256
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        tokens, mask, negative_tokens, negative_mask = self.pipe.encode_prompt(
            list(prompts),
            negatives is not None,
            negative_prompt=list(negatives or []),
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        cond = Conditioning(tokens=tokens, mask=mask)
        if negatives is not None:
            cond |= {f"{NEGATIVE}tokens": negative_tokens, f"{NEGATIVE}mask": negative_mask}
        return cond

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype = transformer.dtype
        return -transformer(
            hidden_states=x.to(dtype),
            timestep=1 - t / 1000,
            encoder_hidden_states=branch["tokens"].to(dtype),
            encoder_attention_mask=branch["mask"],
            return_dict=False,
        )[0]

    def guide(self, v_negative: Tensor, v_positive: Tensor, guidance: float) -> Tensor:
        guided = super().guide(v_negative, v_positive, guidance)
        return guided * (v_positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
