"""Image-text similarity by CLIP (arXiv:2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

from flowalign.rewards.embedding import TextImage


@dataclass(eq=False)
class ClipScore(TextImage):
    """Cosine similarity of image and prompt in [-1, 1]; CLIPScore (arXiv:2104.08718) is 2.5 · max(cosine, 0)."""

    pretrained: str = "openai/clip-vit-large-patch14"
