"""FLUX.1 Kontext, editing of a picture (FluxKontextPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.models.base import SHARED
from flowalign.models.flux1 import Flux1, positions
from flowalign.models.latents import pack
from flowalign.models.pictures import given_pictures, size_of
from flowalign.types import Conditioning

PICTURE = f"{SHARED}picture"


class Flux1Kontext(Flux1):
    """The given picture goes in as further tokens, whose positions have 1 instead of 0 in front.

    It is brought to the size of the one that is made, so that a batch has one shape. The pipeline's own call would
    choose that size from the picture's proportions, about 1024×1024 pixels of them.
    """

    pipeline = "FluxKontextPipeline"
    sees_images = True

    def seen(
        self, prompts: Sequence[str], images: Sequence[Tensor] | None, size: tuple[int, int, int | None] | None
    ) -> Conditioning:
        height, width, _ = size_of(self, size)
        pictures = given_pictures(self, prompts, images, most=1)
        return Conditioning({PICTURE: torch.cat([self._latents(picture, height, width) for (picture,) in pictures])})

    def _latents(self, picture: Any, height: int, width: int) -> Tensor:
        processor, vae = self.pipe.image_processor, self.pipe.vae
        pixels = processor.preprocess(processor.resize(picture, height, width), height, width)
        return self.pipe._encode_vae_image(pixels.to(self.device, vae.dtype), generator=None).float()

    def patches(self, x: Tensor, branch: Conditioning) -> tuple[Tensor, Tensor]:
        seen = branch[PICTURE]
        at = positions(seen)
        at[:, 0] = 1
        return torch.cat([pack(x), pack(seen)], dim=1), torch.cat([positions(x), at])
