"""Aesthetic rating of an image, regardless of its prompt: LAION's improved aesthetic predictor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flowalign.rewards.base import RewardError
from flowalign.rewards.drawings import drawings, noise
from flowalign.rewards.embedding import ModelReward
from flowalign.rewards.weights import build_mlp, fetch, load_model, load_tensors, strip_prefix


@dataclass(eq=False)
class Aesthetic(ModelReward):
    """Rating from 1 to 10 by linear layers on the normalised image embedding of CLIP ViT-L/14.

    head, head_file: hub id or folder of the linear layers, and their file (layers.N.weight, layers.N.bias).
    """

    pretrained: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor"
    head_file: str = "aesthetic-model.pth"

    def load(self) -> nn.Module:
        head = strip_prefix(load_tensors(fetch(self.head, self.head_file)), "layers.")
        clip = load_model("CLIPVisionModelWithProjection", self.pretrained, self.revision, self.weights_dtype)
        return nn.ModuleDict({"clip": clip, "head": build_mlp(head, f"{self.head}/{self.head_file}")})

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del prompts, metadata
        pixels = self.transform(pictures).to(self.weights_dtype)
        embeds = normalize(self.model["clip"](pixel_values=pixels).image_embeds.float(), dim=-1)
        return self.model["head"](embeds)[:, 0]

    def self_check(self) -> None:
        """Raise RewardError unless drawings and noise get different ratings in the range of the scale, 1 to 10."""
        pictures = torch.cat([drawings(), noise()[None]])
        scores = self(pictures, [""] * len(pictures), [{}] * len(pictures))
        if not ((scores >= 1) & (scores <= 10)).all() or scores.std() < 1e-3:
            low, high = scores.min().item(), scores.max().item()
            raise RewardError(
                f"{self.name} rates five different images {low:.3g} to {high:.3g}; different ratings between 1 and "
                "10 were expected: head or network are not the published ones."
            )
