"""Pictures that are given beside a prompt, as pipelines take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def given_pictures(prompts: Sequence[str], images: Sequence[Tensor] | None, most: int, name: str) -> list[list[Any]]:
    """The pictures (n, 3, H, W) of each prompt as lists of PIL images, of 8 bits; 1 ≤ n ≤ most."""
    from diffusers.image_processor import VaeImageProcessor

    counts = [len(pictures) for pictures in images or ()]
    if len(counts) != len(prompts) or not all(1 <= n <= most for n in counts):
        wanted = "exactly one picture" if most == 1 else f"one to {most} pictures"
        raise ValueError(f"{name} sees {wanted} for each of {len(prompts)} prompts (got {counts or 'none'}).")
    as_arrays = [VaeImageProcessor.pt_to_numpy(pictures) for pictures in images or ()]
    return [VaeImageProcessor.numpy_to_pil(pictures) for pictures in as_arrays]
