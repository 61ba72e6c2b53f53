"""Chroma (ChromaPipeline): FLUX.1 without guidance distillation, and with padding tokens masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import NEGATIVE, FlowModel
from flowalign.models.flux1 import positions
from flowalign.models.latents import pack, unpack
from flowalign.types import Conditioning


class Chroma(FlowModel):
    """Under gradient checkpointing diffusers omits the mask in the single blocks, which changes the prediction.

    The mask of 0 and 1 is added to the attention scores, as in the pipeline (diffusers issue 13619).
    """

    pipeline = "ChromaPipeline"
    checkpointing_is_exact = False
    default_max_sequence_length = 512
    default_lora_targets = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @property
    def latent_channels(self) -> int:
        return self.pipe.transformer.config.in_channels // 4

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        tokens, _, mask, negative_tokens, _, negative_mask = self.pipe.encode_prompt(
            list(prompts),
            list(negatives or []),
            self.device,
            do_classifier_free_guidance=negatives is not None,
            max_sequence_length=self.max_sequence_length,
        )
        cond = Conditioning(tokens=tokens, mask=mask)
        if negatives is not None:
            cond |= {f"{NEGATIVE}tokens": negative_tokens, f"{NEGATIVE}mask": negative_mask}
        return cond

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        dtype, (height, width) = self.pipe.transformer.dtype, x.shape[2:]
        tokens, mask, patches = branch["tokens"].to(dtype), branch["mask"].to(dtype), pack(x).to(dtype)
        v = self.pipe.transformer(
            hidden_states=patches,
            timestep=t / 1000,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=dtype),
            img_ids=positions(x).to(dtype),
            attention_mask=torch.cat([mask, torch.ones_like(patches[..., 0])], dim=1),
            return_dict=False,
        )[0]
        return unpack(v, height, width)
