"""Conversion of PIL images to tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def tensor_of(picture: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
    """(3, H, W) float32 in [0, 1]; if `size` (height, width) is given, scaled to cover it and center-cropped."""
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
