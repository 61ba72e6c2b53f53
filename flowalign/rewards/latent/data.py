"""Training data of a latent reward: latents of the policy, each labelled with the reward of its image or video.

They are stored on disk, several prompts per file; existing files are reused.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from flowalign.conditioner import Conditioner
from flowalign.files import atomic_write
from flowalign.generate import Generated, generate
from flowalign.models.base import FlowModel
from flowalign.prompts import Prompt
from flowalign.sampler import Sampling
from flowalign.scoring import Latents, Scorer
from flowalign.size import Size
from flowalign.types import Conditioning

log = logging.getLogger("flowalign.latent")


@dataclass(frozen=True)
class Media:
    """How many latents to generate: `per_prompt` for each of `prompts` prompts, with noise from `seed`."""

    prompts: int
    per_prompt: int = 8
    strangers: int = 0
    """Number of other prompts that each latent is also labelled for: cheap examples of mismatches."""
    seed: int = 0
    prompts_per_file: int = 16

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.per_prompt < 2:
            raise ValueError(
                "media of one prompt are compared: prompts must be at least 1 and per_prompt at least 2 "
                f"(got {self.prompts} and {self.per_prompt})."
            )
        if not 0 <= self.strangers < self.prompts_per_file:
            raise ValueError(f"strangers must be less than prompts_per_file={self.prompts_per_file}.")


@dataclass
class Examples:
    """N labelled examples; each of the M latents is in 1 + strangers of them."""

    x0: Tensor
    """(M, …) float16 latents."""
    latent: Tensor
    """(N,) indices into x0."""
    prompt: Tensor
    """(N,) indices into the list of prompts; examples of the same prompt are compared."""
    label: Tensor
    """(N,) float32, higher is better."""


class LatentMaker:
    """Generates latents of a policy and labels them."""

    def __init__(
        self,
        model: FlowModel,
        scorer: Scorer,
        conditioner: Conditioner,
        sampling: Sampling,
        size: Size,
        device: torch.device,
    ) -> None:
        self.model, self.scorer, self.conditioner = model, scorer, conditioner
        self.sampling, self.size, self.device = sampling, size, device

    def __call__(self, prompts: Sequence[Prompt], media: Media, folder: Path) -> Examples:
        """Examples of the first media.prompts prompts; missing files in the folder are generated."""
        some, parts = list(prompts[: media.prompts]), []
        for start in range(0, len(some), media.prompts_per_file):
            path = folder / f"{start:06d}.safetensors"
            if not path.is_file():
                end = min(start + media.prompts_per_file, len(some))
                tensors = self.generate_labelled(some[start:end], media, start * media.per_prompt)
                with atomic_write(path) as file:
                    file.write(save(tensors))
                log.info("%s: latents of prompt %d of %d", folder.name, end, len(some))
            parts.append(load_file(path))
        return merge(parts, media)

    def generate_labelled(self, prompts: Sequence[Prompt], media: Media, first: int) -> dict[str, Tensor]:
        """Generate x0 (n, …), all samples of a prompt in a row, and label (1 + strangers, n).

        The labels are for the own prompt and for the ones that follow it in the list.
        """
        n = len(prompts) * media.per_prompt
        latents, labels = [], []
        for start in range(0, n, self.sampling.batch_size):
            rows = range(start, min(start + self.sampling.batch_size, n))
            of = [row // media.per_prompt for row in rows]
            cond = self.conditioner([prompts[i] for i in of], self.device, self.size.area)
            ids = [first + row for row in rows]
            made = generate(self.model, cond, ids, media.seed, self.sampling, self.size, self.device)
            asked = [[prompts[(i + k) % len(prompts)] for i in of] for k in range(1 + media.strangers)]
            labels.append(torch.stack([self._labels(made, cond, some) for some in asked]))
            latents.append(made.x0.half().cpu())
        return {"x0": torch.cat(latents), "label": torch.cat(labels, dim=1)}

    def _labels(self, made: Generated, cond: Conditioning, prompts: list[Prompt]) -> Tensor:
        rewards = self.scorer.rewards(made.media, prompts, Latents(made.x0, cond))
        return self.scorer.combined(rewards).float().cpu()


def merge(parts: Sequence[dict[str, Tensor]], media: Media) -> Examples:
    """Examples of all files, without those that could not be scored."""
    latent, prompt, labels, first = [], [], [], 0
    for part in parts:
        prompts = part["label"].shape[1] // media.per_prompt
        distinct = part["label"][:prompts]  # a last file of few prompts would come round to the own one again
        shifts, n = distinct.shape
        own = torch.arange(n) // media.per_prompt
        shifted = (own + torch.arange(shifts)[:, None]) % prompts
        prompt.append((shifted + first // media.per_prompt).flatten())
        latent.append((torch.arange(n) + first).expand(shifts, n).flatten())
        labels.append(distinct.flatten())
        first += n
    label = torch.cat(labels)
    known = label.isfinite()
    x0 = torch.cat([part["x0"] for part in parts])
    return Examples(x0, torch.cat(latent)[known], torch.cat(prompt)[known], label[known])
