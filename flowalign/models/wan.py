"""Wan 2.1 and 2.2, text to video (WanPipeline)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.models.base import NEGATIVE
from flowalign.models.latents import channel_statistics
from flowalign.models.video import VideoModel
from flowalign.types import Conditioning


class Wan(VideoModel):
    """Time goes in as 1000 sigma, the text padded to one length with zeros that are attended to.

    Checkpoints ship a multistep solver, UniPC, of which only the noise levels are kept: steps are those of
    rollout.solver, and pictures therefore not those of the pipeline's own call unless its scheduler is the Euler one.
    """

    pipeline = "WanPipeline"
    evenly = False
    default_max_sequence_length = 512
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pretrained: str, **settings: Any) -> None:
        super().__init__(pretrained, **settings)
        experts = 1 if self.pipe.config.boundary_ratio is None else 2
        if experts != len(self.denoiser_names):
            raise ValueError(
                f"{pretrained} has {experts} denoiser(s), but {type(self).__name__} drives {len(self.denoiser_names)}: "
                "choose model=wan2_1_… for one and model=wan2_2_… for two."
            )

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.pipe.transformer.config.patch_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        cond = Conditioning({"tokens": self._text(prompts)})
        if negatives is not None:
            cond[f"{NEGATIVE}tokens"] = self._text(negatives)
        return cond

    def _text(self, texts: Sequence[str]) -> Tensor:
        settings = {"max_sequence_length": self.max_sequence_length, "device": self.device}
        return self.pipe.encode_prompt(list(texts), do_classifier_free_guidance=False, **settings)[0]

    def denoiser(self, t: Tensor) -> Any:
        """The network for rows of time t, all on one side of the boundary if there are two."""
        del t
        return self.pipe.transformer

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        network = self.denoiser(t)
        return network(
            hidden_states=x.to(network.dtype),
            timestep=t,
            encoder_hidden_states=branch["tokens"].to(network.dtype),
            return_dict=False,
        )[0]

    def denormalised(self, x: Tensor) -> Tensor:
        mean, std = channel_statistics(self.pipe.vae.config, x)
        return x * std + mean

    def normalised(self, z: Tensor) -> Tensor:
        mean, std = channel_statistics(self.pipe.vae.config, z)
        return (z - mean) / std
