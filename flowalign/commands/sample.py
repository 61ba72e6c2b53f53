"""`flowalign sample`: pictures or videos of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flowalign.commands.saved import Saved, opened
from flowalign.conditioner import Conditioner
from flowalign.evaluation import Shown, stills
from flowalign.generate import generate
from flowalign.grid import grid
from flowalign.media import check_suffix, save
from flowalign.prompts import Prompt, read_prompts
from flowalign.sampler import Sampling
from flowalign.scoring import Latents
from flowalign.size import Size


def sample(
    ckpt: str,
    prompt: str = "",
    prompts: str = "",
    to: str = "",
    seed: int = 0,
    num: int = 1,
    steps: int = 0,
    guidance: float = -1.0,
    size: int = 0,
    weights: str = "",
    compare: bool = False,
    fps: float = 0.0,
) -> None:
    """Writes pictures or videos of a prompt, or of a file of prompts, by the ODE, as the run's evaluation makes them.

    compare=true writes a grid of the base and the trained weights beside them.
    """
    if bool(prompt) == bool(prompts):
        raise ValueError("flowalign sample needs either prompt=… or prompts=FILE.")
    if num < 1 or seed < 0:
        raise ValueError(f"flowalign sample makes num=1 or more pictures from seed=0 or more (got {num}, {seed}).")
    asked = [Prompt(prompt)] if prompt else read_prompts(prompts)
    asked = [p for p in asked for _ in range(num)]
    saved = opened(ckpt, weights, base=compare)
    video = saved.model.modality == "video"
    target = Path(to or ("sample.gif" if video else "sample.png"))
    check_suffix(target, video)
    _check_folder(target.parent)
    sampling, area = saved.sampling(steps, guidance), saved.size(size)
    media = made(saved, asked, seed, sampling, area, saved.weights)
    paths = [target if len(asked) == 1 else target.with_stem(f"{target.stem}_{i}") for i in range(len(asked))]
    for one, path in zip(media, paths, strict=True):
        save(one, path, fps or area.fps or 16)
        print(path)
    if compare:
        path = target.with_name(f"{target.stem}_compare.png")
        _compared(asked, media, made(saved, asked, seed, sampling, area, "base"), path)
        print(path)


def _check_folder(folder: Path) -> None:
    """ValueError for one that cannot be written to, before anything is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"to={folder}/… cannot be written ({error.strerror}).") from error


def made(saved: Saved, asked: list[Prompt], seed: int, sampling: Sampling, size: Size, weights: str) -> Tensor:
    """Media of the prompts, (B, …) on the CPU."""
    parts = batches(saved, list(enumerate(asked)), seed, sampling, size, weights)
    return torch.cat([part.media.cpu() for part in parts])


class Made(NamedTuple):
    """Samples by number, their media (b, …) in [0, 1], and what these were decoded from."""

    numbers: list[int]
    media: Tensor
    latents: Latents


def batches(
    saved: Saved, asked: Sequence[tuple[int, Prompt]], seed: int, sampling: Sampling, size: Size, weights: str
) -> Iterator[Made]:
    """Numbered prompts in batches of the sampling.

    The number keys the noise: a sample is the same picture whatever else is asked for.
    """
    condition = Conditioner(saved.model, sampling.guidance > saved.model.guidance_off)
    for start in range(0, len(asked), sampling.batch_size):
        numbers, prompts = zip(*asked[start : start + sampling.batch_size], strict=True)
        with saved.use(weights):
            cond = condition(list(prompts), saved.model.device, size.area)
            part = generate(saved.model, cond, numbers, seed, sampling, size, saved.model.device)
        yield Made(list(numbers), part.media, Latents(part.x0, cond))


def _compared(asked: list[Prompt], after: Tensor, before: Tensor, path: Path) -> None:
    def shown(media: Tensor) -> Shown:
        return Shown(stills(media), [p.text for p in asked], {})

    Image.fromarray(grid(shown(before), shown(after), titles=("before", "after"))).save(path)
