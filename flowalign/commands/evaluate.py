"""`flowalign evaluate`: scores of a checkpoint, or of its base, on a set of prompts with fixed seeds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flowalign.collect import Size
from flowalign.commands.sample import batches
from flowalign.commands.saved import Saved, opened
from flowalign.evaluation import Shown, stills
from flowalign.grid import grid
from flowalign.prompts import Prompt, PromptSet
from flowalign.run import instantiate
from flowalign.sampler import Sampling
from flowalign.scoring import Latents


def evaluate(
    ckpt: str,
    prompts: str = "",
    split: str = "test",
    to: str = "evaluation",
    num: int = 0,
    seed: int = -1,
    steps: int = 0,
    guidance: float = -1.0,
    size: int = 0,
    weights: str = "live",
) -> None:
    """Scores fixed prompts with fixed noise by the run's own rewards: scores.csv, summary.json and pictures.png.

    Without other words these are prompts and noise of the run's final evaluation: weights=live gives its figures again,
    and weights=base those before training.
    """
    if split not in ("val", "test"):
        raise ValueError(f"split is val or test (got {split!r}).")
    saved = opened(ckpt, weights, scored=True)
    asked = _asked(saved, prompts, split, num)
    evaluation = saved.config.evaluation
    seed = evaluation.seed if seed < 0 else seed
    media, scores = _judged(saved, asked, seed, saved.sampling(steps, guidance), saved.size(size), weights)
    folder = Path(to)
    folder.mkdir(parents=True, exist_ok=True)
    _table(folder / "scores.csv", asked, scores)
    summary = summarised(asked, scores)
    about = {"ckpt": str(saved.path), "weights": weights, "seed": seed, "samples": len(asked), "scores": summary}
    (folder / "summary.json").write_text(json.dumps(about, indent=2))
    wanted = instantiate(evaluation).shows(len(asked))
    shown = Shown(stills(media)[wanted], [asked[i].text for i in wanted], {n: s[wanted] for n, s in scores.items()})
    Image.fromarray(grid(shown)).save(folder / "pictures.png")
    for name, value in summary.items():
        print(f"{name:24} {value:.4f}")
    print(folder)


def _judged(
    saved: Saved, asked: list[Prompt], seed: int, sampling: Sampling, size: Size, weights: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Media (B, …) and every measure by name, (B,) each, on the CPU."""
    media: list[Tensor] = []
    scores: list[dict[str, Tensor]] = []
    for part, cond in batches(saved, asked, seed, sampling, size, weights):
        done = len(scores) * sampling.batch_size
        these = asked[done : done + len(part.media)]
        scores.append(saved.scorer.all(part.media, these, Latents(part.x0, cond)))  # type: ignore[union-attr]
        media.append(part.media.cpu())
    return torch.cat(media), {name: torch.cat([part[name].cpu() for part in scores]) for name in scores[0]}


def _asked(saved: Saved, prompts: str, split: str, num: int) -> list[Prompt]:
    """The prompts of the run's evaluation, or those of a file in their order."""
    if prompts:
        read = PromptSet.read(prompts).prompts
        return read[: num or len(read)]
    data = instantiate(saved.config.data[split])
    return [data.prompts[i] for i in data.fixed(num or saved.config.evaluation[f"num_{split}"])]


def summarised(asked: list[Prompt], scores: dict[str, Tensor]) -> dict[str, float]:
    """Means over what could be scored, of all and of each `tag`; and how much could not."""
    tags = sorted({str(p.metadata["tag"]) for p in asked if "tag" in p.metadata})
    summary: dict[str, float] = {}
    for name, values in scores.items():
        summary[name] = float(values.nanmean())
        for tag in tags:
            mine = torch.tensor([str(p.metadata.get("tag")) == tag for p in asked])
            summary[f"{name}/{tag}"] = float(values[mine].nanmean())
        if missing := int(values.isnan().sum()):
            summary[f"{name}/not_scored"] = missing / len(values)
    return summary


def _table(path: Path, asked: list[Prompt], scores: dict[str, Tensor]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "prompt", "tag", *scores])
        for i, prompt in enumerate(asked):
            values = [f"{float(column[i]):.6g}" for column in scores.values()]
            writer.writerow([i, prompt.text, prompt.metadata.get("tag", ""), *values])
