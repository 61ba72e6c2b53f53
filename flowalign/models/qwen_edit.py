"""Qwen-Image-Edit-Plus, editing of one or several images (QwenImageEditPlusPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.models.base import NEGATIVE, SHARED
from flowalign.models.qwen_image import QwenImage
from flowalign.models.reference_images import pil_images, required_size
from flowalign.types import Conditioning

PICTURE = f"{SHARED}picture"


class QwenImageEdit(QwenImage):
    """Reference images enter twice: through the vision-language text encoder, and as latents appended to x.

    The latents have the generated size, so that all rows of a batch have one shape; the pipeline's own call would
    choose about 1024×1024 pixels in the aspect ratio of each image. All prompts of a batch need the same number of
    images. The processor of the published checkpoint needs torchvision.
    """

    pipeline = "QwenImageEditPlusPipeline"
    sees_images = True
    max_images = 3
    """The most that the model was trained with."""

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] | None = None,
        images: Sequence[Tensor] | None = None,
        size: tuple[int, int, int | None] | None = None,
    ) -> Conditioning:
        height, width, _ = required_size(self, size)
        rows = []
        for i, references in enumerate(pil_images(self, prompts, images, self.max_images)):
            row = self._encode_text(prompts[i], references)
            if negatives is not None:
                row |= {f"{NEGATIVE}{key}": entry for key, entry in self._encode_text(negatives[i], references).items()}
            row |= {f"{PICTURE}{n}": self._latents(image, height, width) for n, image in enumerate(references)}
            rows.append(row)
        return Conditioning.cat(rows)

    def _encode_text(self, text: str, images: Sequence[Any]) -> Conditioning:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        resized = []
        for image in images:
            width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, image.width / image.height)
            resized.append(self.pipe.image_processor.resize(image, height, width))
        tokens, _ = self.pipe.encode_prompt([text], resized, self.device)  # a single text has no mask
        return Conditioning({"tokens": tokens, "mask": torch.ones_like(tokens[..., 0], dtype=torch.long)})

    def _latents(self, image: Any, height: int, width: int) -> Tensor:
        pixels = self.pipe.image_processor.preprocess(image, height, width)[:, :, None]
        latents = self.pipe._encode_vae_image(pixels.to(self.device, self.pipe.vae.dtype), generator=None)
        return latents[:, :, 0].float()

    def reference_latents(self, branch: Conditioning) -> list[Tensor]:
        return [branch[key] for key in sorted(key for key in branch if key.startswith(PICTURE))]
