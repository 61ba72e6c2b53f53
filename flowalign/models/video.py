"""Base class of the video families, whose latents (B, C, F', H', W') have frames as a third dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowalign.models.base import FlowModel


class VideoModel(FlowModel):
    """The VAE is causal in time: the first latent frame encodes one frame, each later one `compression[0]` frames."""

    modality = "video"
    vae_in_3d = True

    @property
    def compression(self) -> tuple[int, int]:
        """Compression factors of the VAE, in time and in space."""
        return self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patch size of the transformer: latent frames, rows and columns per token."""
        config = self.pipe.transformer.config
        return config.patch_size_t, config.patch_size, config.patch_size

    @property
    def size_multiple(self) -> int:
        return self.compression[1] * self.patch[1]

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        self._check_sides(height, width)
        factor, name = self.compression[0], type(self).__name__
        if frames is None:
            raise ValueError(f"{name} makes videos: set resolution.*.frames, to 1 more than a multiple of {factor}.")
        if frames < 1 or (frames - 1) % factor:
            nearest = max(0, round((frames - 1) / factor)) * factor + 1
            raise ValueError(
                f"{name} cannot make videos of {frames} frames: it must be 1 more than a multiple of {factor}; "
                f"the nearest is {nearest}."
            )

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        in_time, in_space = self.compression
        return self.latent_channels, ((frames or 1) - 1) // in_time + 1, height // in_space, width // in_space

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        return math.prod(self.latent_shape(height, width, frames)[1:]) // math.prod(self.patch)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return super().decode(x).transpose(1, 2)

    @torch.no_grad()
    def encode_images(self, media: Tensor) -> Tensor:
        """Encode videos (B, F, 3, H, W) in [0, 1] to float32 latents on the scale of the denoiser."""
        return super().encode_images(media.transpose(1, 2))
