"""Pictures that are given beside a prompt, as pipelines take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flowalign.models.base import FlowModel

Size = tuple[int, int, int | None]


def given_pictures(
    model: FlowModel, prompts: Sequence[str], images: Sequence[Tensor] | None, most: int
) -> list[list[Any]]:
    """The pictures (n, 3, H, W) of each prompt as PIL images, of 8 bits; 1 ≤ n ≤ most."""
    from diffusers.image_processor import VaeImageProcessor

    pictures = list(images or ())
    counts = [len(several) for several in pictures]
    if len(counts) != len(prompts) or not all(1 <= n <= most for n in counts):
        wanted = "one picture" if most == 1 else f"1 to {most} pictures"
        raise ValueError(
            f"{type(model).__name__} sees {wanted} beside each prompt: {len(prompts)} prompt(s) came with {counts}."
        )
    return [VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(several)) for several in pictures]


def size_of(model: FlowModel, size: Size | None) -> Size:
    """(height, width, frames) of what will be made."""
    if size is None:
        raise ValueError(f"{type(model).__name__} encodes pictures for one size of what is made: give size=….")
    return size
