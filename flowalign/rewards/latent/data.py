"""What a latent reward learns from: latents of the policy, each with the reward of its picture or video.

They are kept on disk in parts, some prompts each; a part that is already there is not made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowalign.collect import Size
from flowalign.conditioner import Conditioner
from flowalign.dynamics import ODE
from flowalign.models.base import FlowModel
from flowalign.prompts import Prompt
from flowalign.sampler import Noise, Rows, Sampling, deterministic, walk
from flowalign.scoring import Scorer


@dataclass(frozen=True)
class Media:
    """How many are made: `per_prompt` of each of the first prompts, `prompts_per_file` prompts in one file."""

    sampling: Sampling
    prompts: int
    per_prompt: int = 8
    prompts_per_file: int = 8
    strangers: int = 0
    """So many other prompts of its file each one is scored against as well: cheap examples of what was not asked."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_prompt < 2:
            raise ValueError(f"per_prompt={self.per_prompt}: pictures of one prompt are compared, so at least 2.")
        if not 0 <= self.strangers < self.prompts_per_file:
            raise ValueError(f"strangers={self.strangers} must be less than prompts_per_file={self.prompts_per_file}.")


@dataclass
class Labelled:
    """N examples; one latent may be in several, with other prompts."""

    x0: Tensor
    """(M, …) float16, distinct."""
    latent: Tensor
    """(N,) rows of x0."""
    prompt: Tensor
    """(N,) positions in the list of prompts: what is compared has the same."""
    label: Tensor
    """(N,) float32, higher is better."""
    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.label)


def labelled(
    model: FlowModel,
    scorer: Scorer,
    conditioner: Conditioner,
    prompts: Sequence[Prompt],
    media: Media,
    size: Size,
    device: torch.device,
    folder: Path,
    report: Callable[[int, int], None],
) -> Labelled:
    """All of it, made where missing; `report` is told how many files there are, of how many."""
    chosen = list(prompts)[: media.prompts]
    starts = range(0, len(chosen), media.prompts_per_file)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in enumerate(starts):
        path = folder / f"{number:05d}.safetensors"
        if not path.is_file():
            these = chosen[start : start + media.prompts_per_file]
            made = _made(model, scorer, conditioner, these, media, size, device, first=start * media.per_prompt)
            save_file(made, f"{path}.part")
            os.replace(f"{path}.part", path)
        parts.append(load_file(path))
        report(number + 1, len(starts))
    return _joined(parts, chosen, media)


@torch.no_grad()
def _made(
    model: FlowModel,
    scorer: Scorer,
    conditioner: Conditioner,
    prompts: list[Prompt],
    media: Media,
    size: Size,
    device: torch.device,
    first: int,
) -> dict[str, Tensor]:
    """Latents of some prompts, sample-major, and (1 + strangers, n) labels: their own prompt's, then other prompts'."""
    everyone = [p for p in prompts for _ in range(media.per_prompt)]
    latents, labels = [], []
    for start in range(0, len(everyone), media.sampling.batch_size):
        here = slice(start, start + media.sampling.batch_size)
        cond = conditioner(everyone[here], device, size.area)
        ids = range(first + start, first + start + len(everyone[here]))
        x0 = latents_of(model, cond, ids, media, size, device)
        decoded = model.decode(x0)
        asked = [everyone[start:] + everyone[:start]] 
        rolled = [everyone[media.per_prompt * k :] + everyone[: media.per_prompt * k] for k in range(1 + media.strangers)]
        labels.append(torch.stack([scorer.combined(scorer.rewards(decoded, asked[here])) for asked in rolled]).cpu())
        latents.append(x0.half().cpu())
    return {"x0": torch.cat(latents), "label": torch.cat(labels, dim=1)}
