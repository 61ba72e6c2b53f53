"""Training data of the embedded pipeline: scenes, captions as token ids, and latents cached on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from omegaconf import DictConfig
from torch import Tensor

from flowalign.shapes import tokenizer
from flowalign.shapes.render import picture
from flowalign.shapes.world import KINDS, Spec, specs


def draw_specs(number: int, mix: dict[str, float], seed: int) -> list[Spec]:
    """Draw `number` specifications with the given share of each kind."""
    rng = np.random.default_rng(seed)
    pools = {kind: specs(kind) for kind in KINDS}
    kinds = rng.choice(KINDS, size=number, p=np.array([mix[k] for k in KINDS]) / sum(mix.values()))
    return [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]


def pictures(chosen: list[Spec], first_seed: int, size: int) -> Tensor:
    """Render specifications to (B, 3, size, size) in [0, 1]."""
    images = np.stack([picture(spec, first_seed + i, size) for i, spec in enumerate(chosen)])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


class Captions:
    """Token ids of every wording of every specification, tokenized once, so that a step only indexes them."""

    def __init__(self) -> None:
        self.rows: dict[Spec, list[int]] = {}
        texts = [""]
        for kind in KINDS:
            for spec in specs(kind):
                wordings = spec.captions()
                self.rows[spec] = list(range(len(texts), len(texts) + len(wordings)))
                texts += wordings
        encoded = tokenizer.build()(texts, padding="max_length", max_length=tokenizer.MAX_LENGTH, truncation=True)
        self.ids = torch.tensor(encoded["input_ids"])

    def draw(self, chosen: list[Spec], dropout: float, rng: np.random.Generator) -> Tensor:
        rows = [0 if rng.random() < dropout else rng.choice(self.rows[spec]) for spec in chosen]
        return self.ids[torch.tensor(rows)]

    def empty(self, number: int) -> Tensor:
        """(number, length) ids of the empty caption."""
        return self.ids[:1].expand(number, -1)


def to_numpy(decoded: Tensor) -> np.ndarray:
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()


@torch.no_grad()
def cache_latents(cfg: DictConfig, folder: Path, vae: AutoencoderKL, size: int, number: int, seed: int) -> np.ndarray:
    """Phase 2: cache normalised latents (number, C, size/4, size/4) as float16 on disk; scene i has seed `seed + i`."""
    path = folder / f"latents_{size}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    chosen = draw_specs(number, cfg.mix, seed)
    out = np.empty((number, cfg.latent_channels, size // 4, size // 4), dtype=np.float16)
    chunk = 64 * 64 * 256 // size**2
    for start in range(0, number, chunk):
        images = pictures(chosen[start : start + chunk], seed + start, size)
        z = vae.encode(2 * images.contiguous(memory_format=torch.channels_last) - 1).latent_dist.mean
        out[start : start + chunk] = ((z - vae.config.shift_factor) * vae.config.scaling_factor).half().numpy()
    partial = path.with_suffix(".tmp.npy")
    np.save(partial, out)
    os.replace(partial, path)
    return out
