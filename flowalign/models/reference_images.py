"""Images that come with a prompt: to be edited, or as the first frame of a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flowalign.models.base import FlowModel

Size = tuple[int, int, int | None]


def pil_images(
    model: FlowModel, prompts: Sequence[str], images: Sequence[Tensor] | None, at_most: int
) -> list[list[Any]]:
    """Convert the images (n, 3, H, W) of each prompt to 8-bit PIL images. Raises ValueError unless 1 ≤ n ≤ at_most."""
    from diffusers.image_processor import VaeImageProcessor

    per_prompt = list(images or ())
    counts = [len(tensor) for tensor in per_prompt]
    if len(counts) != len(prompts) or not all(1 <= n <= at_most for n in counts):
        wanted = "one image" if at_most == 1 else f"1 to {at_most} images"
        raise ValueError(
            f"{type(model).__name__} needs {wanted} with each prompt: {len(prompts)} prompt(s) came with {counts}."
        )
    return [VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(tensor)) for tensor in per_prompt]


def required_size(model: FlowModel, size: Size | None) -> Size:
    """The (height, width, frames) to generate. Raises ValueError if it is missing."""
    if size is None:
        raise ValueError(f"{type(model).__name__} encodes images for the size that is generated: give size=….")
    return size
