"""LTX-Video, text-to-video (LTXPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.models.video import VideoModel
from flowalign.types import Conditioning


class LTXVideo(VideoModel):
    """The network takes 1000 sigma. Positions are in seconds and pixels, so the frame rate is an input.

    Timestep-conditioned decoders (0.9.1 and later) get timestep 0, i.e. no noise, the pipeline's default.
    """

    pipeline = "LTXPipeline"
    default_max_sequence_length = 128
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pretrained: str, frame_rate: float = 25.0, **settings: Any) -> None:
        """frame_rate: frames per second."""
        super().__init__(pretrained, **settings)
        self.frame_rate = frame_rate

    @property
    def compression(self) -> tuple[int, int]:
        return self.pipe.vae_temporal_compression_ratio, self.pipe.vae_spatial_compression_ratio

    def text(self, texts: Sequence[str]) -> Conditioning:
        settings = {"max_sequence_length": self.max_sequence_length, "device": self.device}
        tokens, mask, *_ = self.pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, **settings)
        return Conditioning({"tokens": tokens, "mask": mask})

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype, (frames, height, width) = transformer.dtype, x.shape[2:]
        in_time, in_space = self.compression
        patch = {"patch_size": self.patch[1], "patch_size_t": self.patch[0]}
        v = transformer(
            hidden_states=self.pipe._pack_latents(x, **patch).to(dtype),
            encoder_hidden_states=branch["tokens"].to(dtype),
            timestep=t,
            encoder_attention_mask=branch["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(in_time / self.frame_rate, in_space, in_space),
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(v, frames, height, width, **patch)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipe.vae
        timestep = torch.zeros(len(x), device=x.device, dtype=vae.dtype) if vae.config.timestep_conditioning else None
        video = vae.decode(self.denormalised(x).to(vae.dtype), timestep, return_dict=False)[0]
        return (video.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    def denormalised(self, x: Tensor) -> Tensor:
        return self.pipe._denormalize_latents(x, *self._statistics())

    def normalised(self, z: Tensor) -> Tensor:
        return self.pipe._normalize_latents(z, *self._statistics())

    def _statistics(self) -> tuple[Tensor, Tensor, float]:
        vae = self.pipe.vae
        return vae.latents_mean, vae.latents_std, vae.config.scaling_factor
