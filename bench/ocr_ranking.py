"""Whether the OCR reward ranks a word above the same word damaged, and that above another word.

    python bench/ocr_ranking.py --engine rapidocr --words 200
    python bench/ocr_ranking.py --engine tesseract --damage covered

Each word is drawn in a random colour, size and position on a plain background. Damage is "garbled": two inner letters
are replaced, and noise of standard deviation 0.1 is added; or "covered": weak noise is added, and two inner letters are
replaced by noise. Prints one JSON object: `ranked`, the share of words with clean > damaged > other, the shares of both
inequalities, and the mean score of each kind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowalign.rewards.drawings import image_to_tensor
from flowalign.rewards.ocr import OCR, edit_distance

TEXT = """
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
"""
WORDS = TEXT.split()
SIDE = 256


Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


class Canvas:
    """Style and position of a drawn word."""

    def __init__(self, word: str, rng: np.random.Generator) -> None:
        self.word, ground = word, int(rng.integers(200, 256))
        self.ink = tuple(int(value) for value in rng.integers(0, 90, 3))
        self.ground = (ground, ground, int(rng.integers(200, 256)))
        self.size = SIDE / len(word) * rng.uniform(1.1, 1.5)
        self.font = ImageFont.load_default(size=self.size)
        self.left = rng.uniform(8, max(9, SIDE - 8 - self.font.getlength(word)))
        self.top = rng.uniform(20, SIDE - 20 - self.size)

    def drawn(self, word: str) -> Tensor:
        """(3, SIDE, SIDE) in [0, 1]."""
        image = Image.new("RGB", (SIDE, SIDE), self.ground)
        ImageDraw.Draw(image).text((self.left, self.top), word, self.ink, font=self.font)
        return image_to_tensor(image)

    def boxes(self) -> list[Box]:
        """Bounding boxes of the letters."""
        ends = [self.left + self.font.getlength(self.word[:i]) for i in range(len(self.word) + 1)]
        top, bottom = int(self.top), int(self.top + 1.2 * self.size)
        return [(int(first), top, round(last), bottom) for first, last in zip(ends[:-1], ends[1:], strict=True)]


def covered(canvas: Canvas, rng: np.random.Generator) -> Tensor:
    """Draw the word with weak noise, and only noise in place of two inner letters."""
    picture = noisy(canvas.drawn(canvas.word), 0.03, rng)
    boxes = canvas.boxes()
    for number in inner(canvas.word, rng):
        left, top, right, bottom = boxes[number]
        patch = picture[:, top:bottom, left:right]
        picture[:, top:bottom, left:right] = torch.from_numpy(rng.random(tuple(patch.shape))).float()
    return picture.clamp(0, 1)


def garbled(canvas: Canvas, rng: np.random.Generator) -> Tensor:
    """Draw the word with noise and with two inner letters replaced."""
    letters = list(canvas.word)
    for number in inner(canvas.word, rng):
        letters[number] = str(rng.choice([letter for letter in ascii_lowercase if letter not in canvas.word]))
    return noisy(canvas.drawn("".join(letters)), 0.1, rng).clamp(0, 1)


DAMAGES = {"garbled": garbled, "covered": covered}


def inner(word: str, rng: np.random.Generator) -> list[int]:
    """Positions of two letters, neither the first nor the last."""
    return rng.choice(np.arange(1, len(word) - 1), size=2, replace=False).tolist()


def noisy(picture: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """Add normal noise."""
    return picture + deviation * torch.from_numpy(rng.standard_normal(tuple(picture.shape))).float()


def unlike(word: str, rng: np.random.Generator) -> str:
    """Another word, at an edit distance of at least three quarters of the length."""
    others = [w for w in WORDS if edit_distance(w, word) >= 0.75 * len(word)]
    return str(rng.choice(others))


def measure(engine: str, words: Sequence[str], damage: str = "garbled", seed: int = 0) -> dict[str, Any]:
    """Results of one engine; see the module docstring."""
    reward = OCR(engine)  # type: ignore[arg-type]
    rows = []
    for number, word in enumerate(words):
        rng = np.random.default_rng((seed, number))
        canvas = Canvas(word, rng)
        bad, other = DAMAGES[damage](canvas, rng), unlike(word, rng)
        pictures = torch.stack([canvas.drawn(word), bad, Canvas(other, rng).drawn(other)])
        rows.append(reward(pictures, [f'a sign that says "{word}"'] * 3, [{}] * 3))
    clean, bad, other = torch.stack(rows).T
    return {
        "engine": engine,
        "damage": damage,
        "words": len(words),
        "ranked": round(float(((clean > bad) & (bad > other)).float().mean()), 4),
        "clean_over_damaged": round(float((clean > bad).float().mean()), 4),
        "damaged_over_other": round(float((bad > other).float().mean()), 4),
        "mean_scores": [round(float(kind.mean()), 3) for kind in (clean, bad, other)],
        "not_in_order": [word for word, c, b, o in zip(words, clean, bad, other, strict=True) if not c > b > o],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="rapidocr", choices=["rapidocr", "tesseract"])
    parser.add_argument("--damage", default="garbled", choices=list(DAMAGES))
    parser.add_argument("--words", type=int, default=len(WORDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.engine, WORDS[: arguments.words], arguments.damage, arguments.seed), indent=2))


if __name__ == "__main__":
    main()
