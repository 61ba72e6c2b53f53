"""Does the OCR reward rank a written word above the same word with damaged letters, and that above another word?

    python bench/ocr_ranking.py --engine rapidocr --words 200
    python bench/ocr_ranking.py --engine tesseract

Each word is drawn in a colour, size and place of its own on a plain background. Damaged: noise covers two letters of
it, and weak noise everything. Prints one JSON object: `ranked`, the share of words with clean > damaged > wrong, the
shares of both halves of that, and the mean score of each kind.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowalign.rewards.ocr import OCR, edit_distance

WORDS = """
airport almond anchor animal apricot arcade archive arrival autumn avenue balance bakery balloon bamboo banana barber
basket battery beacon bedroom bicycle biscuit blanket blossom bottle bridge broken bronze brother bucket budget buffalo
builder burger butter button cabinet camera candle canyon carbon carpet castle ceiling central century ceramic chamber
channel chapter charity chicken chimney chocolate church cinema circus citizen climate cloud coconut coffee college
comedy compass concert copper corner cotton council country courage cousin cricket crystal culture curtain cushion
customer danger daylight december delivery denim dentist desert dessert diamond dinner doctor dolphin dragon drawing
driver eagle eastern emerald empire engine evening express fabric factory family farmer fashion
feather festival fiction finger fishing flower football forest fortune forward fountain freedom friday friend
frozen future galaxy gallery garden garlic ginger glacier golden grammar grandma granite gravity grocery guitar hammer
harbor harvest helmet heritage history holiday honest horizon hospital hotel hunter husband iceberg island jacket
january jasmine journal journey jungle justice kettle kingdom kitchen ladder lantern laundry lavender leather lemon
liberty library lighthouse limited liquid lobster london lumber magnet mailbox mango marble market meadow medicine
member memory message midnight mineral mirror monday monster morning mountain museum mustard needle
nickel notebook number ocean office olive
""".split()
SIDE = 256


def drawn(word: str, rng: np.random.Generator) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """The picture (3, SIDE, SIDE) in [0, 1] and the boxes (left, top, right, bottom) of the letters."""
    ground = int(rng.integers(200, 256))
    ink = tuple(int(value) for value in rng.integers(0, 90, 3))
    image = Image.new("RGB", (SIDE, SIDE), (ground, ground, int(rng.integers(200, 256))))
    draw = ImageDraw.Draw(image)
    size = SIDE / len(word) * rng.uniform(1.1, 1.5)
    font = ImageFont.load_default(size=size)
    left = rng.uniform(8, max(9, SIDE - 8 - draw.textlength(word, font)))
    top = rng.uniform(20, SIDE - 20 - size)
    draw.text((left, top), word, ink, font=font)
    ends = [left + draw.textlength(word[:i], font) for i in range(len(word) + 1)]
    boxes = [(int(a), int(top), round(b), int(top + 1.2 * size)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, boxes


def damaged(picture: Tensor, boxes: list[tuple[int, int, int, int]], rng: np.random.Generator) -> Tensor:
    """Noise over two inner letters, and weak noise over everything."""
    picture = picture + 0.03 * torch.from_numpy(rng.standard_normal(picture.shape)).float()
    for number in rng.choice(np.arange(1, len(boxes) - 1), size=2, replace=False):
        left, top, right, bottom = boxes[number]
        patch = picture[:, top:bottom, left:right]
        picture[:, top:bottom, left:right] = torch.from_numpy(rng.random(tuple(patch.shape))).float()
    return picture.clamp(0, 1)


def unlike(word: str, rng: np.random.Generator) -> str:
    """Another word, at least three quarters of whose letters would have to change."""
    others = [w for w in WORDS if edit_distance(w, word) >= 0.75 * len(word)]
    return str(rng.choice(others))


def measure(engine: str, words: list[str], seed: int = 0) -> dict[str, Any]:
    """Figures of one engine; see the module."""
    reward = OCR(engine)  # type: ignore[arg-type]
    rows = []
    for number, word in enumerate(words):
        rng = np.random.default_rng((seed, number))
        clean, boxes = drawn(word, rng)
        pictures = torch.stack([clean, damaged(clean, boxes, rng), drawn(unlike(word, rng), rng)[0]])
        rows.append(reward(pictures, [f'a sign that says "{word}"'] * 3, [{}] * 3))
    clean, noisy, wrong = torch.stack(rows).T
    return {
        "engine": engine,
        "words": len(words),
        "ranked": round(float(((clean > noisy) & (noisy > wrong)).float().mean()), 4),
        "clean_over_damaged": round(float((clean > noisy).float().mean()), 4),
        "damaged_over_wrong": round(float((noisy > wrong).float().mean()), 4),
        "mean_scores": [round(float(kind.mean()), 3) for kind in (clean, noisy, wrong)],
        "not_in_order": [word for word, c, n, w in zip(words, clean, noisy, wrong, strict=True) if not c > n > w],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="rapidocr", choices=["rapidocr", "tesseract"])
    parser.add_argument("--words", type=int, default=len(WORDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.engine, WORDS[: arguments.words], arguments.seed), indent=2))


if __name__ == "__main__":
    main()
