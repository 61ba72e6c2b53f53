"""Packing of latents into tokens, and their statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """Pack (B, C, H, W) into tokens (B, H/2 · W/2, 4C), one per patch of 2×2."""
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpack tokens to (B, C, height, width), both in latents: the inverse of `pack`."""
    return (tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)).reshape(
        len(tokens), -1, height, width
    )


def channel_statistics(config: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent channels in a VAE's config, (1, C, 1, …) with as many dims as x."""
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    mean, std = (torch.tensor(values, dtype=x.dtype, device=x.device).view(shape) for values in
                 (config.latents_mean, config.latents_std))  # fmt: skip
    return mean, std
