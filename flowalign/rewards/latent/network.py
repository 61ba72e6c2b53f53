"""Trunk and head as one network, from noisy latents to a reward."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from flowalign.rewards.latent.head import Head
from flowalign.rewards.latent.trunk import Trunk

if TYPE_CHECKING:
    from flowalign.types import Conditioning


@dataclass(frozen=True)
class Build:
    """Architecture: the first `blocks` blocks of the model, of which the last `trained` are fine-tuned, and the head.

    hidden: widths of the MLP. The defaults are PAVRM's on Wan 2.1.
    """

    blocks: int = 8
    trained: int = 8
    heads: int = 8
    hidden: Sequence[int] = (1024, 512)

    def __post_init__(self) -> None:
        if not 0 <= self.trained <= self.blocks:
            raise ValueError(
                f"trained counts the last of blocks={self.blocks}, 0 to {self.blocks} (got {self.trained})."
            )


@dataclass(frozen=True)
class Link:
    """Maps logits to rewards: to probabilities, or affinely for unbounded labels."""

    kind: Literal["sigmoid", "line"] = "sigmoid"
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, logit: Tensor) -> Tensor:
        return logit.sigmoid() if self.kind == "sigmoid" else self.scale * logit + self.shift


class Network(nn.Module):
    """The latent reward. Parameters with requires_grad are trained and saved; the others are the model's."""

    def __init__(self, trunk: Trunk, build: Build, width: int) -> None:
        """width: of the trunk's tokens."""
        super().__init__()
        self.build, self.link = build, Link()
        self.trunk = trunk.requires_grad_(False)
        for block in self.trunk.blocks[build.blocks - build.trained :]:
            block.requires_grad_(True)
        self.head = Head(width, build.heads, build.hidden)

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Logits (B,) float32 of x (B, …) at sigma (B,)."""
        return self.head(self.trunk(x, sigma, cond).float()).float()

    def reward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Rewards (B,) of x (B, …) at sigma (B,)."""
        return self.link(self(x, sigma, cond))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def fingerprint(self) -> str:
        """Hash of the model's weights that are used as they are, independent of the precision they were loaded in."""
        digest = hashlib.sha256()
        for name, p in self.trunk.network.named_parameters():
            if not p.requires_grad:
                rounded = p.detach().to("cpu", torch.bfloat16).contiguous()
                digest.update(name.encode() + rounded.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]
