"""Stable Diffusion 3 and 3.5 (StableDiffusion3Pipeline), including the embedded tiny_sd3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models import schedule
from flowalign.models.base import NEGATIVE, FlowModel
from flowalign.types import Conditioning


class SD3(FlowModel):
    """The network takes 1000 sigma and unpacked latents, and predicts v itself."""

    pipeline = "StableDiffusion3Pipeline"
    evenly = False
    takes_attention_backend = False
    default_max_sequence_length = 256  # T5 tokens; without T5 they are this many zeros
    default_lora_targets = tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        super().check_size(height, width, frames)
        config = self.pipe.transformer.config
        limit = config.pos_embed_max_size * config.patch_size * self.pipe.vae_scale_factor
        if max(height, width) > limit:
            raise ValueError(f"this model has positions for pictures up to {limit}×{limit} (got {height}×{width}).")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        tokens, negative_tokens, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=negatives is not None,
            negative_prompt=None if negatives is None else list(negatives),
            max_sequence_length=self.max_sequence_length,
        )
        cond = Conditioning({"tokens": tokens, "pooled": pooled})
        if negatives is not None:
            cond |= {f"{NEGATIVE}tokens": negative_tokens, f"{NEGATIVE}pooled": negative_pooled}
        return cond

    def mu(self, num_steps: int, height: int, width: int, frames: int | None) -> float | None:
        config = self.pipe.scheduler.config
        dynamic = config.get("use_dynamic_shifting")
        return schedule.linear_mu(config, self.tokens(height, width, frames), max_shift=1.16) if dynamic else None

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype = transformer.dtype
        return transformer(
            hidden_states=x.to(dtype),
            timestep=t,
            encoder_hidden_states=branch["tokens"].to(dtype),
            pooled_projections=branch["pooled"].to(dtype),
            return_dict=False,
        )[0]
