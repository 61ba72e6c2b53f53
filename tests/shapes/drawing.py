"""Things that the renderer would never draw, for the tests of whoever must not be fooled by them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from flowalign.shapes.render import render
from flowalign.shapes.world import COLOURS

LIGHT = np.full(3, 0.94, dtype=np.float32)


def canvas(size: int = 64) -> np.ndarray:
    return np.broadcast_to(LIGHT, (size, size, 3)).copy()


def colour_of(name: str) -> np.ndarray:
    return np.array(COLOURS[name], dtype=np.float32)


def paint(image: np.ndarray, share: np.ndarray, colour: np.ndarray | str, strength: float = 1.0) -> np.ndarray:
    """`image` with `colour` laid over it where `share` (H, W) is 1."""
    value = colour_of(colour) if isinstance(colour, str) else np.asarray(colour, dtype=np.float32)
    return (image + strength * share[..., None] * (value - image)).astype(np.float32)


def superellipse(size: int, x: float, y: float, rx: float, ry: float, exponent: float = 2.0) -> np.ndarray:
    """(size, size) soft mask of |x/rx|^n + |y/ry|^n < 1: an ellipse for n = 2, a rounded square for 3 or 4."""
    axis = (np.arange(size) + 0.5) / size
    u, v = abs(axis[None, :] - x) / rx, abs(axis[:, None] - y) / ry
    return np.clip(0.5 - ((u**exponent + v**exponent) ** (1 / exponent) - 1) * min(rx, ry) * size, 0, 1)


def specks(image: np.ndarray, number: int, side: int, colour: str, seed: int = 0) -> np.ndarray:
    """Squares of `side` pixels strewn over what is still background, two pixels away from everything."""
    rng, out, size = np.random.default_rng(seed), image.copy(), image.shape[0]
    while number:
        row, column = rng.integers(2, size - side - 2, 2)
        around = out[row - 2 : row + side + 2, column - 2 : column + side + 2]
        if np.ptp(around, axis=(0, 1)).max() < 1e-3:
            out[row : row + side, column : column + side] = colour_of(colour)
            number -= 1
    return out


def blurred(image: np.ndarray) -> np.ndarray:
    """The mean of every three by three pixels."""
    return ndimage.uniform_filter(image, 3, axes=(0, 1))


def draw(placed: list, size: int = 64, colours: np.ndarray | None = None) -> np.ndarray:
    """The renderer with the palette's own colours on the mean background."""
    if colours is None:
        colours = np.array([COLOURS[item.thing[0]] for item in placed], dtype=np.float32)
    return render(placed, LIGHT, size, colours)
