"""Preprocessing of images for vision models, on any device and without torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate, pad

from flowalign.rewards.base import RewardError

Triple = tuple[float, float, float]

CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {2: "bilinear", 3: "bicubic"}
"""PIL's codes of the resampling filters that vision models use."""


def quantise(pictures: Tensor) -> Tensor:
    """Round to multiples of 1/255 in [0, 1], as in an 8-bit image file."""
    return (pictures.clamp(0, 1) * 255 + 0.5).floor() / 255  # rounds halves up, as PIL does


def resize(pictures: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize (N, 3, H, W) to (N, 3, height, width) as PIL does: antialiased, rows first, 8 bits after each axis.

    The models were trained on images that their official processors resized with PIL.
    """
    pictures = quantise(pictures)
    for size in ((pictures.shape[-2], width), (height, width)):
        if pictures.shape[-2:] != size:
            pictures = quantise(interpolate(pictures, size, mode=mode, antialias=True, align_corners=False))
    return pictures


@dataclass(frozen=True)
class ImageTransform:
    """Image processor: resize, optionally center-crop, normalise.

    fit: "stretch" to size = (height, width); "shortest" or "longest" resizes that side to size[0] and keeps the aspect
    ratio, the latter with black padding to a square. crop: (height, width) of the center crop, or None.
    """

    size: tuple[int, int]
    fit: Literal["stretch", "shortest", "longest"] = "shortest"
    crop: tuple[int, int] | None = None
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    mode: str = "bicubic"

    @classmethod
    def from_config(cls, settings: Mapping[str, Any], source: str) -> ImageTransform:
        """The processor described by a preprocessor_config.json; `source` names it in the error message."""
        try:
            size = settings["size"]
            size = {"shortest_edge": size} if isinstance(size, int) else size  # older files of CLIP
            square = "height" in size
            crop = settings.get("crop_size") if settings.get("do_center_crop") else None
            crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
            side = None if square else size["shortest_edge"]
            return cls(
                (size["height"], size["width"]) if side is None else (side, side),
                "stretch" if square else "shortest",
                None if crop is None else (crop["height"], crop["width"]),
                _triple(settings["image_mean"]),
                _triple(settings["image_std"]),
                FILTERS[settings.get("resample", 3)],
            )
        except (KeyError, TypeError) as error:
            raise RewardError(f"the preprocessor_config.json of {source} has an unknown format ({error}).") from error

    def __call__(self, pictures: Tensor) -> Tensor:
        """Preprocess images (N, 3, H, W) in [0, 1] → (N, 3, h, w) float32."""
        pictures = resize(pictures, *self._target_size(pictures.shape[-2], pictures.shape[-1]), mode=self.mode)
        if self.fit == "longest":
            pictures = _pad_to_square(pictures, self.size[0])
        if self.crop is not None:
            pictures = _center_crop(pictures, *self.crop)
        mean, std = (pictures.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pictures - mean) / std

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "stretch":
            return self.size
        side = self.size[0]
        if self.fit == "longest":
            scale = side / max(height, width)
            return round(height * scale), round(width * scale)
        # The longer side is truncated to an integer, as in PIL processors and torchvision.
        return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def _triple(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _pad_to_square(pictures: Tensor, side: int) -> Tensor:
    height, width = side - pictures.shape[-2], side - pictures.shape[-1]
    return pad(pictures, (width // 2, width - width // 2, height // 2, height - height // 2))


def _center_crop(pictures: Tensor, height: int, width: int) -> Tensor:
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]


def as_bytes(media: Tensor) -> np.ndarray:
    """Convert (…, 3, H, W) in [0, 1] to (…, H, W, 3) uint8."""
    return (media.detach().float().clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()
