"""`flowalign sample`: generate images or videos from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flowalign.commands.saved import SavedRun, load_run
from flowalign.conditioner import Conditioner
from flowalign.evaluation import Shown, stills
from flowalign.generate import generate
from flowalign.grid import grid
from flowalign.media import check_suffix, save
from flowalign.prompt_media import check_images
from flowalign.prompts import Prompt, PromptSet
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
    """Writes images or videos of a prompt, or of a file of prompts, sampled by the ODE as in the run's evaluation.

    compare=true also writes a grid that compares the base with the trained weights.
    """
    if bool(prompt) == bool(prompts):
        raise ValueError("flowalign sample needs either prompt=… or prompts=FILE.")
    if num < 1 or seed < 0:
        raise ValueError(f"flowalign sample makes num=1 or more pictures from seed=0 or more (got {num}, {seed}).")
    wanted = [p for p in ([Prompt(prompt)] if prompt else PromptSet.read(prompts).prompts) for _ in range(num)]
    saved = load_run(ckpt, weights, base=compare)
    if prompt and saved.model.sees_images:
        raise ValueError(
            "prompt=… names no image, and this model takes some: use prompts=FILE, with `image` in each line."
        )
    video = saved.model.modality == "video"
    target = Path(to or ("sample.gif" if video else "sample.png")).expanduser()
    check_suffix(target, video)
    _check_folder(target.parent)
    sampling, area = saved.sampling(steps, guidance), saved.size(size)
    media = generate_media(saved, wanted, seed, sampling, area, saved.weights)
    paths = [target if len(wanted) == 1 else target.with_stem(f"{target.stem}_{i}") for i in range(len(wanted))]
    for one, path in zip(media, paths, strict=True):
        save(one, path, fps or area.fps or 16)
        print(path)
    if compare:
        path = target.with_name(f"{target.stem}_compare.png")
        _write_comparison(wanted, media, generate_media(saved, wanted, seed, sampling, area, "base"), path)
        print(path)


def _check_folder(folder: Path) -> None:
    """Create the folder before anything is generated; raise ValueError if it cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"to={folder}/… cannot be written ({error.strerror}).") from error


def generate_media(
    saved: SavedRun, prompts: list[Prompt], seed: int, sampling: Sampling, size: Size, weights: str
) -> Tensor:
    """Generate the media of the prompts, (B, …) on the CPU."""
    parts = batches(saved, list(enumerate(prompts)), seed, sampling, size, weights)
    return torch.cat([part.media.cpu() for part in parts])


class Batch(NamedTuple):
    """Sample numbers, their media (b, …) in [0, 1], and the latents that were decoded."""

    numbers: list[int]
    media: Tensor
    latents: Latents


def batches(
    saved: SavedRun, numbered: Sequence[tuple[int, Prompt]], seed: int, sampling: Sampling, size: Size, weights: str
) -> Iterator[Batch]:
    """Generate numbered prompts in batches of sampling.batch_size.

    The number keys the noise, so a sample does not depend on the others.
    """
    if saved.model.sees_images:
        check_images([prompt for _, prompt in numbered], saved.model.max_images)
    condition = Conditioner(saved.model, sampling.guidance > saved.model.guidance_off)
    for start in range(0, len(numbered), sampling.batch_size):
        numbers, prompts = zip(*numbered[start : start + sampling.batch_size], strict=True)
        with saved.use(weights):
            cond = condition(list(prompts), saved.model.device, size.area)
            part = generate(saved.model, cond, numbers, seed, sampling, size, saved.model.device)
        yield Batch(list(numbers), part.media, Latents(part.x0, cond))


def _write_comparison(prompts: list[Prompt], after: Tensor, before: Tensor, path: Path) -> None:
    def shown(media: Tensor) -> Shown:
        return Shown(stills(media), [p.text for p in prompts], {})

    Image.fromarray(grid(shown(before), shown(after), titles=("before", "after"))).save(path)
