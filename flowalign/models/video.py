"""What the video families share: frames as a third side of the latent, (B, C, F', H', W')."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowalign.models.base import FlowModel


class VideoModel(FlowModel):
    """The VAE is causal in time: its first latent frame is one picture, every further one `compression[0]` of them."""

    modality = "video"

    @property
    def compression(self) -> tuple[int, int]:
        """How many frames, and how many pixels of a side, become one latent."""
        return self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns that become one token."""
        config = self.pipe.transformer.config
        return config.patch_size_t, config.patch_size, config.patch_size

    @property
    def size_multiple(self) -> int:
        return self.compression[1] * self.patch[1]

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        self._check_sides(height, width)
        step, name = self.compression[0], type(self).__name__
        if frames is None:
            raise ValueError(f"{name} makes videos: set resolution.*.frames, to 1 more than a multiple of {step}.")
        if frames < 1 or (frames - 1) % step:
            nearest = max(0, round((frames - 1) / step)) * step + 1
            raise ValueError(
                f"{name} cannot make videos of {frames} frames: it must be 1 more than a multiple of {step}; "
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
        """Videos (B, F, 3, H, W) in [0, 1] to latents in float32, normalised as the denoiser knows them."""
        return super().encode_images(media.transpose(1, 2))
