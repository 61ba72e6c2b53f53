"""Human preference for images of a prompt, by PickScore (arXiv:2305.01569)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowalign.rewards.embedding import TextImage


@dataclass(eq=False)
class PickScore(TextImage):
    """exp(logit scale) · cosine, about 15 to 25; P(a is preferred to b) = sigmoid(score of a - score of b)."""

    pretrained: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return self.model.logit_scale.float().exp() * super().judge(pictures, prompts, metadata)
