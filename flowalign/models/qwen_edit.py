"""Qwen-Image-Edit-Plus, editing of one or several pictures (QwenImageEditPlusPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.models.base import NEGATIVE, SHARED
from flowalign.models.pictures import given_pictures, size_of
from flowalign.models.qwen_image import QwenImage
from flowalign.types import Conditioning

PICTURE = f"{SHARED}picture"


class QwenImageEdit(QwenImage):
    """Given pictures are seen twice: by the language model, and as latents that follow x, an entry for each.

    Latents are of the size that is made, so that a batch has one shape; the pipeline's own call would choose about
    1024×1024 pixels of the picture's proportions. Prompts that are trained together need equally many pictures.
    The processor of the published folder needs torchvision.
    """

    pipeline = "QwenImageEditPlusPipeline"
    sees_images = True
    most_pictures = 3
    """As many as it was trained with."""

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] | None = None,
        images: Sequence[Tensor] | None = None,
        size: tuple[int, int, int | None] | None = None,
    ) -> Conditioning:
        height, width, _ = size_of(self, size)
        rows = []
        for i, pictures in enumerate(given_pictures(self, prompts, images, self.most_pictures)):
            row = self._read(prompts[i], pictures)
            if negatives is not None:
                row |= {f"{NEGATIVE}{key}": entry for key, entry in self._read(negatives[i], pictures).items()}
            row |= {f"{PICTURE}{n}": self._latents(picture, height, width) for n, picture in enumerate(pictures)}
            rows.append(row)
        return Conditioning.cat(rows)

    def _read(self, text: str, pictures: Sequence[Any]) -> Conditioning:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        looks = []
        for picture in pictures:
            width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, picture.width / picture.height)
            looks.append(self.pipe.image_processor.resize(picture, height, width))
        tokens, _ = self.pipe.encode_prompt([text], looks, self.device)  # a text alone has no mask
        return Conditioning({"tokens": tokens, "mask": torch.ones_like(tokens[..., 0], dtype=torch.long)})

    def _latents(self, picture: Any, height: int, width: int) -> Tensor:
        pixels = self.pipe.image_processor.preprocess(picture, height, width)[:, :, None]
        latents = self.pipe._encode_vae_image(pixels.to(self.device, self.pipe.vae.dtype), generator=None)
        return latents[:, :, 0].float()

    def given(self, branch: Conditioning) -> list[Tensor]:
        return [branch[key] for key in sorted(key for key in branch if key.startswith(PICTURE))]
