"""Decides from pixels alone what a picture shows, and how far it agrees with a specification.

Palette segmentation, connected components, template matching of each component, then the rules of GenEval: the right
number of the right things, nothing else, and the relation between their centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from flowalign.shapes.render import coverage
from flowalign.shapes.world import COLOURS, SHAPES, Spec

_NAMES = tuple(COLOURS)
_LIGHT = np.float32(0.94)  # the mean background
# A pixel on an anti-aliased edge lies on the line from the background to its colour, so colours are told apart by
# their direction from the background; the nearest palette entry would call the edge of a red square yellow.
_OFFSET = _LIGHT - np.array([*COLOURS.values()], dtype=np.float32)
_LENGTH = np.linalg.norm(_OFFSET, axis=1)
_DIRECTION = (_OFFSET / _LENGTH[:, None]).T
_BACKGROUND = -1
MIN_COVER = 0.45  # of the way from the background to the colour
MIN_AREA = 0.006  # of the picture; smaller specks are no thing (25 pixels at 64)
MIN_OVERLAP = 0.72  # intersection over union with the best template, below which a component has no shape


@dataclass(frozen=True)
class Found:
    """A component: `shape` is None where no template fits; x, y its centre and area in units of the picture."""

    colour: str
    shape: str | None
    x: float
    y: float
    area: float


@lru_cache(maxsize=8192)
def _templates(height: int, width: int) -> np.ndarray:
    """(shapes, height * width) masks of the ideal shapes, each stretched to exactly this bounding box."""
    spans = {"circle": (-1, 1, -1, 1), "square": (-0.88, 0.88, -0.88, 0.88), "cross": (-1, 1, -1, 1), "triangle": (-0.95, 0.95, -0.95, 0.95)}
    masks = []
    for shape in SHAPES:
        x0, x1, y0, y1 = spans[shape]
        x = x0 + (np.arange(width) + 0.5) / width * (x1 - x0)
        y = y0 + (np.arange(height) + 0.5) / height * (y1 - y0)
        masks.append(coverage(shape, x[None, :], y[:, None], 1e-6).ravel() > 0.5)
    return np.stack(masks).astype(np.float32)


def _shape_of(mask: np.ndarray) -> str | None:
    height, width = mask.shape
    if not 0.6 < width / height < 1 / 0.6:
        return None
    templates, flat = _templates(height, width), mask.ravel().astype(np.float32)
    overlap = templates @ flat
    scores = overlap / (templates.sum(1) + flat.sum() - overlap)
    best = int(scores.argmax())
    return SHAPES[best] if scores[best] >= MIN_OVERLAP else None


def _labels(image: np.ndarray) -> np.ndarray:
    """(H, W) index of each pixel's colour, or -1 for background."""
    along = (_LIGHT - image.reshape(-1, 3)) @ _DIRECTION
    colour = along.argmax(1)
    cover = along.max(1) / _LENGTH[colour]
    return np.where(cover > MIN_COVER, colour, _BACKGROUND).reshape(image.shape[:2])


def find(image: np.ndarray) -> list[Found]:
    """Everything in a picture (H, W, 3) with values in [0, 1]."""
    height, width = image.shape[:2]
    labels = _labels(np.asarray(image, dtype=np.float32))
    found = []
    for index in np.unique(labels):
        if index == _BACKGROUND:
            continue
        components, _ = ndimage.label(labels == index)
        for region, box in enumerate(ndimage.find_objects(components), start=1):
            mask = components[box] == region
            area = mask.sum() / (height * width)
            if area < MIN_AREA:
                continue
            rows, columns = np.nonzero(mask)
            y, x = (rows.mean() + box[0].start + 0.5) / height, (columns.mean() + box[1].start + 0.5) / width
            found.append(Found(_NAMES[index], _shape_of(mask), float(x), float(y), float(area)))
    return found


def _relation_margin(spec: Spec, found: list[Found]) -> float:
    """How far the relation holds, -1 to 1 in picture sides; -1 unless exactly one component is each of the two things."""
    sides = [[f for f in found if (f.colour, f.shape) == thing] for thing in spec.things]
    if any(len(side) != 1 for side in sides):
        return -1.0
    (first,), (second,) = sides
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[spec.relation or ""]
    return along if along > abs(across) else min(along, 0.0)


def _agreement(spec: Spec, found: list[Found]) -> float:
    """Greedy matching of things to components: 1 for both attributes right, ½ for one; divided by the longer list."""
    score, rest = 0.0, list(found)
    for worth in (1.0, 0.5):
        open_things = []
        for colour, shape in spec.things if worth == 1.0 else remaining:
            hits = [f for f in rest if ((f.colour == colour) + (f.shape == shape)) / 2 == worth]
            if hits:
                rest.remove(hits[0])
                score += worth
            else:
                open_things.append((colour, shape))
        remaining = open_things
    return score / max(len(spec.things), len(found))


def verify(image: np.ndarray, spec: Spec) -> tuple[float, float]:
    """(strict, partial): strict is 1 where the picture shows exactly the specification, else 0; partial is in [0, 1].

    For positions, the partial score is 0.7 times the agreement of the things plus 0.3 times how far the relation holds
    (full marks from a fifth of the picture on).
    """
    found = find(image)
    agreement = _agreement(spec, found)
    if spec.relation is None:
        return float(agreement == 1.0), agreement
    margin = _relation_margin(spec, found)
    strict = agreement == 1.0 and margin > 0.1
    return float(strict), 0.7 * agreement + 0.3 * float(np.clip((margin + 0.2) / 0.4, 0, 1)) * (margin > -1)
