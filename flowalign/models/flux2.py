"""FLUX.2 (Flux2KleinPipeline, Flux2Pipeline): one latent is one token; the shift depends on the number of steps too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowalign.models.base import FlowModel
from flowalign.types import Conditioning


class Flux2Klein(FlowModel):
    """`guidance` is the pipeline's guidance_scale, with any negative prompt, while the pipeline's is always empty.

    The models distilled to 4 steps are meant to run without it. Image editing is not supported.
    """

    pipeline = "Flux2KleinPipeline"
    default_max_sequence_length = 512
    # Without the single blocks' attn.to_out: peft matches suffixes, and in the double blocks to_out is a ModuleList.
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        return (self.latent_channels, height // self.size_multiple, width // self.size_multiple)

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        return math.prod(self.latent_shape(height, width)[1:])

    def mu(self, num_steps: int, height: int, width: int, frames: int | None) -> float | None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        dynamic = self.pipe.scheduler.config.use_dynamic_shifting
        return compute_empirical_mu(self.tokens(height, width), num_steps) if dynamic else None

    def text(self, texts: Sequence[str]) -> Conditioning:
        length = self.max_sequence_length
        return Conditioning(tokens=self.pipe.encode_prompt(list(texts), self.device, max_sequence_length=length)[0])

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype, guided = transformer.dtype, transformer.config.guidance_embeds
        tokens = branch["tokens"].to(dtype)
        v = transformer(
            hidden_states=x.flatten(2).transpose(1, 2).to(dtype),
            timestep=t / 1000,
            guidance=torch.full_like(t, self.embedded_guidance) if guided else None,
            encoder_hidden_states=tokens,
            txt_ids=self.pipe._prepare_text_ids(tokens[:1]).to(x.device),
            img_ids=self.pipe._prepare_latent_ids(x[:1]).to(x.device),
            return_dict=False,
        )[0]
        return v.transpose(1, 2).unflatten(2, x.shape[2:])

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipe.vae
        mean, std = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return mean.view(1, -1, 1, 1).to(x), std.view(1, -1, 1, 1).to(x)

    def denormalised(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return self.pipe._unpatchify_latents(x * std + mean)

    def normalised(self, z: Tensor) -> Tensor:
        patches = self.pipe._patchify_latents(z)
        mean, std = self._statistics(patches)
        return (patches - mean) / std


class Flux2(Flux2Klein):
    """Guidance-distilled: `embedded_guidance` is the pipeline's guidance_scale, and `guidance` is usually off.

    The tokenizer of the published checkpoint is a processor for images too, which needs torchvision.
    """

    pipeline = "Flux2Pipeline"
    default_embedded_guidance = 4.0
