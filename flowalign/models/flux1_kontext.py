"""FLUX.1 Kontext, image editing (FluxKontextPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.models.base import SHARED
from flowalign.models.flux1 import Flux1, positions
from flowalign.models.latents import pack
from flowalign.models.reference_images import pil_images, required_size
from flowalign.types import Conditioning

PICTURE = f"{SHARED}picture"


class Flux1Kontext(Flux1):
    """The reference image is appended as tokens whose positions start with 1 instead of 0.

    It is resized to the generated size, so that all rows of a batch have one shape. The pipeline's own call would
    choose about 1024×1024 pixels in the aspect ratio of the image.
    """

    pipeline = "FluxKontextPipeline"
    sees_images = True

    def seen(
        self, prompts: Sequence[str], images: Sequence[Tensor] | None, size: tuple[int, int, int | None] | None
    ) -> Conditioning:
        height, width, _ = required_size(self, size)
        references = pil_images(self, prompts, images, self.max_images)
        return Conditioning({PICTURE: torch.cat([self._latents(image, height, width) for (image,) in references])})

    def _latents(self, image: Any, height: int, width: int) -> Tensor:
        processor, vae = self.pipe.image_processor, self.pipe.vae
        pixels = processor.preprocess(processor.resize(image, height, width), height, width)
        return self.pipe._encode_vae_image(pixels.to(self.device, vae.dtype), generator=None).float()

    def patches(self, x: Tensor, branch: Conditioning) -> tuple[Tensor, Tensor]:
        reference = branch[PICTURE]
        ids = positions(reference)
        ids[:, 0] = 1
        return torch.cat([pack(x), pack(reference)], dim=1), torch.cat([positions(x), ids])
