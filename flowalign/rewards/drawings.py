"""Test images with known rankings, for self-checks that a reward must pass before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowalign.rewards.base import Reward, RewardError

SIDE = 256
STAR = (
    (128, 40),
    (152, 104),
    (220, 104),
    (166, 146),
    (186, 212),
    (128, 172),
    (70, 212),
    (90, 146),
    (36, 104),
    (104, 104),
)
SCENES: dict[str, tuple[str, Callable[[ImageDraw.ImageDraw], None]]] = {
    "a red square on a white background": ("white", lambda d: d.rectangle((64, 64, 192, 192), "red")),
    "a blue circle on a white background": ("white", lambda d: d.ellipse((56, 56, 200, 200), "blue")),
    "a green triangle on a white background": (
        "white",
        lambda d: d.polygon(((128, 48), (208, 200), (48, 200)), "green"),
    ),
    "a yellow star on a black background": ("black", lambda d: d.polygon(STAR, "yellow")),
}


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert to (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def drawings() -> Tensor:
    """One flat drawing per caption of SCENES, (4, 3, 256, 256)."""
    return torch.stack([_draw_scene(background, draw) for background, draw in SCENES.values()])


def noise() -> Tensor:
    """Uniform noise (3, 256, 256), always the same."""
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def render_text(text: str, side: int = SIDE) -> Tensor:
    """Render text in black on white, (3, side, side)."""
    image = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(size=side // (len(text) + 1) * 1.5)
    ImageDraw.Draw(image).text((side / 2, side / 2), text, "black", font=font, anchor="mm")
    return image_to_tensor(image)


def check_matching(reward: Reward, name: str, device: torch.device | str = "cpu") -> None:
    """Raise RewardError unless, for at least 3 of 4 captions, the matching drawing scores above the others and noise.

    Random weights pass in less than 3 % of cases.
    """
    pictures = torch.cat([drawings(), noise()[None]]).to(device)
    captions = [caption for caption in SCENES for _ in pictures]
    scores = reward(pictures.repeat(len(SCENES), 1, 1, 1), captions, [{} for _ in captions]).view(len(SCENES), -1)
    if not scores.isfinite().all():
        raise RewardError(f"{name} gives plain drawings scores that are not finite.")
    right = int((scores.argmax(dim=1).cpu() == torch.arange(len(SCENES))).sum())
    if right < len(SCENES) - 1:
        raise RewardError(
            f"{name} prefers the drawing that its caption describes in {right} of {len(SCENES)} known cases: its "
            "weights are not trained, or not those of this model."
        )


def check_order(name: str, scores: Sequence[float], what: str) -> None:
    """Raise RewardError unless the scores decrease strictly; `what` describes the scored images in the message."""
    if not all(first > second for first, second in zip(scores[:-1], scores[1:], strict=True)):  # false for NaN too
        raise RewardError(f"{name} does not rank {what}: it gives {', '.join(f'{score:.3g}' for score in scores)}.")


def _draw_scene(background: str, draw: Callable[[ImageDraw.ImageDraw], None]) -> Tensor:
    image = Image.new("RGB", (SIDE, SIDE), background)
    draw(ImageDraw.Draw(image))
    return image_to_tensor(image)
