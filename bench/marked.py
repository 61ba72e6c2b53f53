"""Images with a number in their first pixel, and a reward that reads it, which reveals mispaired scores."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


def marked(numbers: list[int], size: int = 64) -> Tensor:
    """Noise images (B, 3, size, size), each with its number, below 2^24, in the first pixel."""
    pictures = torch.rand(len(numbers), 3, size, size, generator=torch.Generator().manual_seed(0))
    for picture, number in zip(pictures, numbers, strict=True):
        picture[:, 0, 0] = torch.tensor([number >> 16, number >> 8 & 255, number & 255]) / 255
    return pictures


class Marked:
    """The number (B,) of each image, or of the last frame of each video; some prompts trigger faults instead."""

    def __init__(self, seconds: float = 0.0) -> None:
        """seconds: time per image."""
        self.seconds = seconds

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        frames = media[:, -1] if media.ndim == 5 else media
        time.sleep(self.seconds * len(media) + sum(entry.get("sleep", 0) for entry in metadata))
        if "raise" in prompts:
            raise RuntimeError("this prompt cannot be scored")
        if "out of memory" in prompts:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        red, green, blue = (frames[:, :, 0, 0] * 255).round().T
        scores = red * 65536 + green * 256 + blue
        scores = torch.where(torch.tensor([prompt == "nan" for prompt in prompts]), torch.nan, scores)
        return scores.tolist() if "list" in prompts else scores  # type: ignore[return-value]


class Members(Marked):
    """A groupwise reward: the number of samples of the same group in the call."""

    groupwise = True

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor) -> Tensor:
        return (groups[:, None] == groups[None, :]).sum(dim=1).float()
