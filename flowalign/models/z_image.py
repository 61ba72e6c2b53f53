"""Z-Image (ZImagePipeline): time is 1 - sigma, and the network predicts -v."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flowalign.models import schedule
from flowalign.models.base import NEGATIVE, FlowModel
from flowalign.types import Conditioning


class ZImage(FlowModel):
    """`guidance` is the pipeline's guidance_scale, which is off at 0: it is 1 less than the usual scale."""

    pipeline = "ZImagePipeline"
    guidance_off = 0.0
    default_max_sequence_length = 512
    one_text_length = False
    default_lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def sigmas(self, num_steps: int, height: int, width: int, frames: int | None = None) -> Tensor:
        scheduler = copy.deepcopy(self.pipe.scheduler)
        # torch and NumPy differ in the last bit of evenly spaced values, and the network amplifies that.
        even = torch.linspace(1.0, 1 / num_steps, num_steps).tolist()
        scheduler.set_timesteps(sigmas=even, mu=self.mu(num_steps, height, width, frames))
        return schedule.from_one(scheduler.sigmas)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        positive, negative = self.pipe.encode_prompt(  # it modifies its arguments: hence new lists
            list(prompts),
            self.device,
            do_classifier_free_guidance=negatives is not None,
            negative_prompt=None if negatives is None else list(negatives),
            max_sequence_length=self.max_sequence_length,
        )
        cond = _pad(positive)
        if negatives is not None:
            cond |= {f"{NEGATIVE}{key}": tensor for key, tensor in _pad(negative).items()}
        return cond

    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        transformer = self.pipe.transformer
        dtype, lengths = transformer.dtype, branch["mask"].sum(1).tolist()
        v = transformer(
            [row.to(dtype) for row in x[:, :, None]],
            (1000 - t) / 1000,
            [row[:length].to(dtype) for row, length in zip(branch["tokens"], lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(v).squeeze(2)

    def guide(self, v_negative: Tensor, v_positive: Tensor, guidance: float) -> Tensor:
        return v_positive + guidance * (v_positive - v_negative)


def _pad(texts: list[Tensor]) -> Conditioning:
    """Pad the tokens (length, D) of each text with zeros, and add their mask."""
    mask = pad_sequence([torch.ones(len(text), device=text.device, dtype=torch.long) for text in texts], True)
    return Conditioning(tokens=pad_sequence(texts, True), mask=mask)
