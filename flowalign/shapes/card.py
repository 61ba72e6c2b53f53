"""Measures the embedded pipeline and writes its card: `python -m flowalign.shapes.card RUN_FOLDER PIPELINE_FOLDER`.

Pictures come from the pipeline's own call, so the card also shows that the folder works in plain diffusers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from omegaconf import OmegaConf

from flowalign.shapes.pretrain import CONF
from flowalign.shapes.verify import verify
from flowalign.shapes.world import COLOURS, KINDS, SHAPES, THINGS, Spec, specs

STEPS, GUIDANCE = (10, 20, 40), (1.0, 2.0)


def load(folder: str) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def questions(split: str, number: int) -> list[Spec]:
    """`number` specifications of a split, as many of each kind; 7919 is prime to every pool, so that nothing repeats early."""
    pools = {kind: [s for s in specs(kind) if s.split == split] for kind in KINDS}
    return [pools[kind][i * 7919 % len(pools[kind])] for kind in KINDS for i in range(number // len(KINDS))]


def measure(
    pipe: StableDiffusion3Pipeline, chosen: list[Spec], steps: int, guidance: float, size: int = 64
) -> dict[str, float]:
    """Strict share in all and by kind, through the pipeline's own call with seed 0."""
    right: dict[str, list[float]] = {kind: [] for kind in KINDS}
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(chosen), 64):
        part = chosen[start : start + 64]
        images = pipe(
            [spec.captions()[i % len(spec.captions())] for i, spec in enumerate(part)],
            num_inference_steps=steps, guidance_scale=guidance, height=size, width=size,
            max_sequence_length=1, generator=generator, output_type="np",
        ).images  # fmt: skip
        for image, spec in zip(images, part, strict=True):
            right[spec.kind].append(verify(image, spec)[0])
    shares = {kind: float(np.mean(r)) for kind, r in right.items()}
    return {"all": float(np.mean([x for r in right.values() for x in r])), **shares}


def chance() -> dict[str, float]:
    """What a painter of well-formed scenes of the right kind, number and layout would score by guessing things.

    For positions: both things are right already, and only the relation (one of four) is guessed.
    """
    n = len(THINGS)
    return {"single": 1 / n, "two": 2 / (n * (n - 1)), "counting": 1 / (3 * n), "position": 1 / 4}


def effort(run: Path, tag: str, stop: int) -> tuple[int, float]:
    """Steps of a phase and the minutes that they took, from the run's TensorBoard files; pauses do not count."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = [e for f in run.glob("tensorboard/events*") for e in _scalars(EventAccumulator(str(f)).Reload(), tag)]
    events = sorted((e for e in events if e[1] <= stop), key=lambda e: e[0])
    gaps = [b - a for (a, _), (b, _) in zip(events, events[1:], strict=False)]
    return max(step for _, step in events), sum(g for g in gaps if g < 300) / 60


def _scalars(accumulator: object, tag: str) -> list[tuple[float, int]]:
    if tag not in accumulator.Tags()["scalars"]:  # type: ignore[attr-defined]
        return []
    return [(e.wall_time, e.step) for e in accumulator.Scalars(tag)]  # type: ignore[attr-defined]


def table(pipe: StableDiffusion3Pipeline, number: int) -> str:
    lines = [f"| pixels | steps | CFG | all | {' | '.join(KINDS)} |", "|---" * (4 + len(KINDS)) + "|"]
    settings = [(64, s, g) for g in GUIDANCE for s in STEPS] + [(128, 10, 1.0)]
    for size, steps, guidance in settings:
        scores = measure(pipe, questions("test", number), steps, guidance, size)
        cells = " | ".join(f"{100 * v:.1f}" for v in scores.values())
        lines.append(f"| {size} | {steps} | {'off' if guidance == 1 else guidance} | {cells} |")
    return "\n".join(lines)


def choose_shift(pipe: StableDiffusion3Pipeline, number: int) -> dict[float, float]:
    """Strict share on the validation prompts at 10 steps for several shifts of the scheduler."""
    found = {}
    for shift in (1.0, 1.5, 2.0, 3.0):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        found[shift] = measure(pipe, questions("val", number), 10, 1.0)["all"]
    return found


def main() -> None:
    run, folder = Path(sys.argv[1]), sys.argv[2]
    pipe = load(folder)
    cfg = OmegaConf.load(f"{CONF}/pretrain.yaml")
    steps, minutes = effort(run, "generator/loss", cfg.train.stop)
    _, vae_minutes = effort(run, "vae/mse", cfg.vae.steps)
    shift = pipe.scheduler.config.shift
    sizes = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters())
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2")
    }
    shifts = choose_shift(pipe, 256)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    number = 256
    text = f"""# tiny_sd3

A miniature of Stable Diffusion 3, trained from nothing by flowalign on scenes that it renders itself: {len(COLOURS)} colours ×
{len(SHAPES)} shapes, alone, in pairs, counted (2 to 4), and in a spatial relation. An ordinary `StableDiffusion3Pipeline` folder.

```python
pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
pipe("a red circle left of a blue square", height=64, width=64, max_sequence_length=1, guidance_scale=1, num_inference_steps=10)
```

`max_sequence_length=1` belongs to the model: it was trained with one empty T5 token, and 256 of them would drown the text.

- **Weights**: {", ".join(f"{name} {n:,}" for name, n in sizes.items())} parameters.
- **Training**: `make pretrain` (conf/pretrain.yaml): {steps} steps of flow matching with batch {cfg.train.batch} on {cfg.data.number_64:,} cached scenes,
  every {cfg.data.every_128}th step at 128 pixels with a quarter of the batch, {100 * cfg.train.caption_dropout:.0f} % of captions dropped. In its last stage
  the network learns its own guidance (model guidance, weight {cfg.train.stages[-1].guide_weight}), so one call a step is enough. {minutes:.0f} minutes on two
  shared CPU cores, after {vae_minutes:.0f} for the VAE. Weights are a moving average.
- **Scheduler**: shift {shift}. On validation prompts, 10 steps, 256 pictures: {", ".join(f"shift {k} → {100 * v:.1f} %" for k, v in shifts.items())}.

Strict share in percent on the test prompts (a colour–shape pair of every prompt is one that alignment never sees), {number} pictures,
seed 0, from the pipeline's own call:

{table(pipe, number)}

Guessing: {", ".join(f"{kind} {100 * p:.1f} %" for kind, p in chance().items())} (things drawn at random in well-formed scenes; for positions both
things right and the relation guessed). Standard error about {100 * 0.5 / number**0.5:.1f} points for all, {100 * 0.5 / (number / 4) ** 0.5:.1f} for a kind.
"""
    (Path(folder) / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
