"""Wan 2.1, image-to-video (WanImageToVideoPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.models.base import SHARED
from flowalign.models.reference_images import pil_images, required_size
from flowalign.models.wan import VISION, Wan
from flowalign.types import Conditioning


class WanImageToVideo(Wan):
    """The first frame enters twice: through CLIP, and as latents of a video that is grey after it, beside x."""

    pipeline = "WanImageToVideoPipeline"
    sees_images = True
    default_lora_targets = (*Wan.default_lora_targets, "add_k_proj", "add_v_proj")  # of the CLIP embedding

    @property
    def latent_channels(self) -> int:
        return self.pipe.vae.config.z_dim

    def seen(
        self, prompts: Sequence[str], images: Sequence[Tensor] | None, size: tuple[int, int, int | None] | None
    ) -> Conditioning:
        first_frames = pil_images(self, prompts, images, self.max_images)
        return Conditioning.cat([self._encode_frame(frame, *required_size(self, size)) for (frame,) in first_frames])

    def _encode_frame(self, frame: Any, height: int, width: int, frames: int | None) -> Conditioning:
        pipe = self.pipe
        pixels = pipe.video_processor.preprocess(frame, height=height, width=width).to(self.device)
        no_noise = torch.zeros(0)  # so that the pipeline draws none
        channels = (1, self.latent_channels, height, width, frames, torch.float32, self.device)
        seen = Conditioning({f"{SHARED}first": pipe.prepare_latents(pixels, *channels, latents=no_noise)[1]})
        if pipe.transformer.config.image_dim is not None:
            seen[VISION] = pipe.encode_image(frame, self.device)
        return seen

    def text(self, texts: Sequence[str]) -> Conditioning:
        from diffusers import WanPipeline

        # This pipeline's own encode_prompt requires ftfy; in WanPipeline, from which it was copied, ftfy is optional.
        settings = {"max_sequence_length": self.max_sequence_length, "device": self.device}
        return Conditioning(tokens=WanPipeline._get_t5_prompt_embeds(self.pipe, list(texts), **settings))  # type: ignore

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        return super().forward(torch.cat([x, branch[f"{SHARED}first"]], dim=1), t, branch)
