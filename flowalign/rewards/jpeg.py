"""JPEG compressibility, a reward without a model (DDPO, arXiv:2305.13301)."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowalign.rewards.base import FrameReward, RewardError
from flowalign.rewards.pixels import as_bytes


class Jpeg(FrameReward):
    """Negative size of an image as JPEG in kilobytes, (B,); the mean over the frames of a video. NaN if not finite."""

    def __init__(self, quality: int = 95, incompressible: bool = False) -> None:
        """quality: of the encoder, 1 to 95; incompressible: reward large files instead of small ones."""
        if not 1 <= quality <= 95:
            raise ValueError(f"quality is that of a JPEG, 1 to 95 (got {quality}).")
        self.quality, self.sign = quality, 1 if incompressible else -1

    def score(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del prompts, metadata
        return torch.tensor([self.sign * self._kilobytes(picture) for picture in pictures], dtype=torch.float32)

    def self_check(self) -> None:
        """Raise RewardError unless noise takes more kilobytes than grey."""
        grey = torch.full((1, 3, 64, 64), 0.5)
        noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        small, large = (self.sign * self(picture, [""], [{}]) for picture in (grey, noise))
        if not small < large:
            raise RewardError(f"noise takes {float(large):.3f} kilobytes and grey {float(small):.3f}.")

    def _kilobytes(self, picture: Tensor) -> float:
        file = BytesIO()
        Image.fromarray(as_bytes(picture)).save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000
