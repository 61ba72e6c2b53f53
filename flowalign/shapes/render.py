"""Render a specification: flat, anti-aliased shapes on a light background, at any resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flowalign.shapes.world import COLOURS, Spec, Thing

CROSS_ARM = 0.36  # half width of a cross's arm, in units of its radius


@dataclass(frozen=True)
class Placed:
    """A thing with centre and radius in units of the image's side (0 to 1, y downwards)."""

    thing: Thing
    x: float
    y: float
    radius: float


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance (h, w) of the points (x, y) from a shape at the origin, negative inside. x: (w,), y: (h,).

    Terms in one coordinate come first, since there are only h + w of them.
    """
    y, half, arm = y[:, None], 0.88 * radius, CROSS_ARM * radius
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "triangle":  # upright, base at the bottom; the side's normal is (2, -1)/sqrt(5)
        base = 0.95 * radius
        return np.maximum(((2 * abs(x) - base) - y) / 5**0.5, y - base)
    ax, ay = abs(x), abs(y)
    if shape == "square":
        return np.maximum(ax - half, ay - half)
    lying, standing = np.maximum(ax - radius, ay - arm), np.maximum(ax - arm, ay - radius)
    return np.minimum(lying, standing)


def coverage(distances: np.ndarray, softness: float) -> np.ndarray:
    """Share of each pixel inside a shape, from its distance to the shape. softness: pixel size, in the same unit."""
    return np.minimum(np.maximum(0.5 - distances / softness, 0), 1)


def render(placed: list[Placed], background: np.ndarray, size: int, colours: np.ndarray) -> np.ndarray:
    """Render things to (size, size, 3) float32 in [0, 1]. colours: (n, 3), the exact colours of the n things."""
    image = np.broadcast_to(background.astype(np.float32), (size, size, 3)).copy()
    for item, colour in zip(placed, colours, strict=True):
        low = np.floor([(item.x - item.radius) * size - 1, (item.y - item.radius) * size - 1]).astype(int).clip(0)
        high = np.ceil([(item.x + item.radius) * size + 1, (item.y + item.radius) * size + 1]).astype(int).clip(0, size)
        xs = (np.arange(low[0], high[0]) + 0.5) / size - item.x
        ys = (np.arange(low[1], high[1]) + 0.5) / size - item.y
        share = coverage(distance(item.thing[1], xs, ys, item.radius), 1 / size)[..., None]
        patch = image[low[1] : high[1], low[0] : high[0]]
        patch += share * (colour - patch)
    return image


def _radius(kind: str, count: int, rng: np.random.Generator) -> float:
    low, high = {"single": (0.15, 0.28), "counting": (0.11, 0.15 if count < 4 else 0.135)}.get(kind, (0.13, 0.18))
    return float(rng.uniform(low, high))


def _fits(new: Placed, placed: list[Placed]) -> bool:
    return all(max(abs(new.x - p.x), abs(new.y - p.y)) > new.radius + p.radius + 0.04 for p in placed)


def _related(first: Placed, second: Placed, relation: str | None) -> bool:
    """Whether the relation holds clearly: far apart along its axis, and at most half as far across it."""
    if relation is None:
        return True
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > 0.3 and abs(across) < 0.5 * along


def place(spec: Spec, rng: np.random.Generator) -> list[Placed]:
    """Draw positions by rejection sampling: nothing touches, everything is inside, and the relation holds clearly."""
    while True:
        placed: list[Placed] = []
        for thing in spec.things:
            for _ in range(40):
                radius = _radius(spec.kind, spec.count, rng)
                x, y = rng.uniform(radius + 0.03, 1 - radius - 0.03, 2)
                item = Placed(thing, float(x), float(y), radius)
                if _fits(item, placed):
                    placed.append(item)
                    break
        if len(placed) == spec.count and (spec.relation is None or _related(*placed, spec.relation)):  # type: ignore
            return placed


def picture(spec: Spec, seed: int, size: int = 64) -> np.ndarray:
    """Render a specification to (size, size, 3) float32 in [0, 1]; a seed gives the same scene at every size."""
    rng = np.random.default_rng([seed, 0x5CE2E])
    placed = place(spec, rng)
    background = np.clip(rng.uniform(0.90, 0.98) + rng.uniform(-0.02, 0.02, 3), 0, 1)
    tint = rng.uniform(-0.05, 0.05, (spec.count, 3))
    colours = np.clip(np.array([COLOURS[item.thing[0]] for item in placed]) + tint, 0, 1)
    return render(placed, background, size, colours.astype(np.float32))


def painted(metadata: dict[str, Any], seed: int, height: int, width: int) -> np.ndarray:
    """Render a prompt's metadata to (height, width, 3), float32 in [0, 1]: the real images of `data=shapes`."""
    if height != width:
        raise ValueError(f"the scenes world draws squares: use resolution.train.width={height} (got {height}×{width}).")
    return picture(Spec.from_metadata(metadata), seed, height)
