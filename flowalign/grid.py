"""Grids of images, captioned with their prompts and scores."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowalign.evaluation import Shown
from flowalign.rewards.pixels import as_bytes

_CELL, _GAP, _LINE = 132, 8, 13


def _picture(image: Tensor) -> Image.Image:
    """Resize (3, H, W) in [0, 1] to the cell width; small images are enlarged without smoothing."""
    small = Image.fromarray(as_bytes(image))
    if small.width >= _CELL:
        return small.resize((_CELL, round(_CELL * small.height / small.width)), Image.Resampling.LANCZOS)
    return small.resize((_CELL, round(_CELL * small.height / small.width)), Image.Resampling.NEAREST)


def _caption(shown: Shown, i: int) -> list[str]:
    scores = " ".join(f"{name} {float(values[i]):.2f}" for name, values in shown.scores.items() if name != "reward")
    if not scores and "reward" in shown.scores:
        scores = f"reward {float(shown.scores['reward'][i]):.2f}"
    return [*textwrap.wrap(shown.prompts[i], 22)[:3], *textwrap.wrap(scores, 24)]


def grid(*rows_of: Shown, columns: int = 8, titles: tuple[str, ...] = ()) -> np.ndarray:
    """Grid (H, W, 3) uint8 of the images of each argument, with `columns` images per row.

    With several arguments (before, after) their rows alternate, so that images of the same prompt are stacked.
    """
    number = min(len(shown.images) for shown in rows_of)
    font = ImageFont.load_default(11)
    ratio = rows_of[0].images.shape[-2] / rows_of[0].images.shape[-1]
    height = round(_CELL * ratio) + 5 * _LINE + _GAP
    left = 60 if titles else _GAP
    blocks = -(-number // columns)
    sheet = Image.new(
        "RGB", (left + min(columns, number) * (_CELL + _GAP), blocks * len(rows_of) * height + _GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i in range(number):
        for j, shown in enumerate(rows_of):
            x, y = left + i % columns * (_CELL + _GAP), (i // columns * len(rows_of) + j) * height + _GAP
            sheet.paste(_picture(shown.images[i]), (x, y))
            for k, line in enumerate(_caption(shown, i)):
                draw.text((x, y + round(_CELL * ratio) + k * _LINE), line, fill="black", font=font)
            if titles and i % columns == 0:
                draw.text((_GAP, y + 20), titles[j], fill="black", font=font)
    return np.asarray(sheet)
