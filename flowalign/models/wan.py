"""Wan 2.1 and 2.2, text-to-video (WanPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.models.base import SHARED
from flowalign.models.latents import channel_statistics
from flowalign.models.video import VideoModel
from flowalign.types import Conditioning

VISION = f"{SHARED}vision"
"""Key of the CLIP embedding of the first frame, for the variants that use one."""


class Wan(VideoModel):
    """The network takes 1000 sigma, and text padded to one length with zeros, which are not masked.

    Checkpoints ship the multistep solver UniPC, of which only the noise levels are used; rollout.solver does the steps.
    Samples therefore differ from those of the pipeline's own call unless its scheduler is the Euler one.
    """

    pipeline = "WanPipeline"
    evenly = False
    default_max_sequence_length = 512
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def denoisers(self) -> dict[str, nn.Module]:
        experts = 1 if self.pipe.config.boundary_ratio is None else 2
        if experts != len(self.denoiser_names):
            raise ValueError(
                f"{self.pretrained} has {experts} denoiser(s), but {type(self).__name__} drives "
                f"{len(self.denoiser_names)}: model=wan2_1_… is for one and model=wan2_2_… for two."
            )
        return super().denoisers()

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.pipe.transformer.config.patch_size

    def text(self, texts: Sequence[str]) -> Conditioning:
        settings = {"max_sequence_length": self.max_sequence_length, "device": self.device}
        return Conditioning(
            tokens=self.pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, **settings)[0]
        )

    def denoiser(self, t: Tensor) -> Any:
        """The network for rows of times t; of two experts, all rows must belong to the same one."""
        del t
        return self.pipe.transformer

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        network = self.denoiser(t)
        vision = branch.get(VISION)
        return network(
            hidden_states=x.to(network.dtype),
            timestep=t,
            encoder_hidden_states=branch["tokens"].to(network.dtype),
            encoder_hidden_states_image=None if vision is None else vision.to(network.dtype),
            return_dict=False,
        )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        mean, std = channel_statistics(self.pipe.vae.config, x)
        return x * std + mean

    def normalised(self, z: Tensor) -> Tensor:
        mean, std = channel_statistics(self.pipe.vae.config, z)
        return (z - mean) / std


class WanTwoExperts(Wan):
    """Wan 2.2: `transformer` is the expert for sigma ≥ the pipeline's boundary_ratio, `transformer_2` for the rest.

    Each row goes to the expert of its sigma, so a batch may leave one of them without gradients: DDP then needs
    trainer.strategy=ddp_find_unused_parameters_true. A sharded expert must be called by all ranks or by none: a rank
    without rows for it sends its first row and discards the output.
    """

    denoiser_names = ("transformer", "transformer_2")

    def __init__(self, pretrained: str, guidance_2: float | None = None, **settings: Any) -> None:
        """guidance_2 is the guidance of the low-noise expert wherever guidance is on; None: the same for both."""
        super().__init__(pretrained, **settings)
        self.guidance_2 = guidance_2

    def is_high_noise(self, t: Tensor) -> Tensor:
        """(B,) bool: the rows of times t that belong to `transformer`."""
        return t >= self.pipe.config.boundary_ratio * 1000

    def denoiser(self, t: Tensor) -> Any:
        return self.pipe.transformer if self.is_high_noise(t).all() else self.pipe.transformer_2

    def velocity(
        self, x: Tensor, sigma: Tensor | float, cond: Conditioning, guidance: float = 1.0, through_both: bool = True
    ) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        low_guidance = guidance
        if guidance > self.guidance_off and self.guidance_2 is not None:
            low_guidance = self.guidance_2
        v = torch.empty_like(x, dtype=torch.float32)
        high = self.is_high_noise(1000 * sigma)
        called = self.agree(torch.stack([high.any(), (~high).any()])).tolist()
        experts = ((high, guidance, 1.0), (~high, low_guidance, 0.0))
        for (mask, scale, extreme), needed in zip(experts, called, strict=True):
            rows = mask.nonzero().flatten()
            if len(rows):
                v = v.index_copy(0, rows, super().velocity(x[rows], sigma[rows], cond.index(rows), scale, through_both))
            elif needed:
                one = slice(0, 1)
                level = torch.full_like(sigma[one], extreme)
                # The sum of an empty slice is 0, but its backward pass still runs through the expert.
                v = v + super().velocity(x[one], level, cond.index(one), scale, through_both)[:0].sum()
        return v
