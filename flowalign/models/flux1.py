"""FLUX.1 (FluxPipeline): guidance-distilled, with 2×2 latents per token and explicit position ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import FlowModel
from flowalign.models.latents import pack, unpack
from flowalign.types import Conditioning


class Flux1(FlowModel):
    """`embedded_guidance` is the pipeline's guidance_scale; `guidance` is its true_cfg_scale, usually off."""

    pipeline = "FluxPipeline"
    default_max_sequence_length = 512
    default_embedded_guidance = 3.5
    default_lora_targets = (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @property
    def latent_channels(self) -> int:
        return self.pipe.transformer.config.in_channels // 4

    def text(self, texts: Sequence[str]) -> Conditioning:
        length = self.max_sequence_length
        tokens, pooled, _ = self.pipe.encode_prompt(list(texts), list(texts), self.device, max_sequence_length=length)
        return Conditioning({"tokens": tokens, "pooled": pooled})

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype, (height, width) = transformer.dtype, x.shape[2:]
        guided = transformer.config.guidance_embeds
        tokens = branch["tokens"].to(dtype)
        patches, position_ids = self.patches(x, branch)
        v = transformer(
            hidden_states=patches.to(dtype),
            timestep=t / 1000,
            guidance=torch.full_like(t, self.embedded_guidance) if guided else None,
            pooled_projections=branch["pooled"].to(dtype),
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=dtype),
            img_ids=position_ids.to(dtype),
            return_dict=False,
        )[0]
        return unpack(v[:, : height * width // 4], height, width)

    def patches(self, x: Tensor, branch: Conditioning) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, 4C), those of x first, and their positions (N, 3)."""
        del branch
        return pack(x), positions(x)


def positions(x: Tensor) -> Tensor:
    """(N, 3): 0, row and column of each token of the latents x."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    ids = torch.zeros(rows, columns, 3, device=x.device)
    ids[..., 1] = torch.arange(rows, device=x.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=x.device)
    return ids.flatten(0, 1)
