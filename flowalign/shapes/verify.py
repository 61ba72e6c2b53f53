"""Recognise the content of an image from its pixels alone, and score its agreement with a specification.

Palette segmentation, connected components, template matching of each component, then the rules of GenEval: the right
number of the right things, nothing else, and the relation between their centres. Since an optimiser finds whatever
passes, everything visible must be accounted for, and doubt counts against the image:

* a colour has a name only within COLOUR_RADIUS of the palette: pale, dark and mixed colours are "other";
* a component has a shape only if it overlaps one template well and every other clearly less (no shape between circle
  and square), is not stretched, has no hole, and is neither too small to recognise nor as large as a backdrop;
* a faint object away from the others is a thing without shape or colour ("faint"), and specks too small to be things
  together form one such thing ("specks") once they cover as much as the smallest thing;
* touching things of the same colour are one component, usually without a shape. A thing slightly cut by the border is
  judged by its visible part. The tint of an even background is left to `quality`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from flowalign.shapes.render import CROSS_ARM, coverage, distance
from flowalign.shapes.world import COLOURS, SHAPES, Spec

_NAMES = tuple(COLOURS)
_PALETTE = np.array([*COLOURS.values()], dtype=np.float32)
_LIGHT = np.float32(0.94)  # the mean background
# A pixel on an anti-aliased edge lies on the line from the background to its colour, so colours are classified by their
# direction from the background; the nearest palette entry would make the edge of a red square yellow.
_OFFSET = _LIGHT - _PALETTE
_LENGTH = np.linalg.norm(_OFFSET, axis=1)
_DIRECTION = _OFFSET / _LENGTH[:, None]
_BACKGROUND, _FAINT = 0, len(_NAMES) + 1  # labels of pixels; those of the palette's colours lie between
_NEIGHBOURS = ndimage.generate_binary_structure(2, 1)
MIN_COVER = 0.45  # of the way from the background to the colour
COLOUR_RADIUS = 0.22  # RGB distance of a thing's median colour; renders reach 0.09, palette entries are 0.48 apart
FAINT = 0.15  # RGB distance from the background at which a large enough object becomes visible
HALO = 0.045  # in image sides: faint pixels within this distance of a thing are its soft edge
MIN_AREA = 0.006  # of the image; less is a speck (25 pixels at 64)
MIN_READABLE = 0.011  # half of the smallest thing ever rendered
MAX_READABLE = 0.4  # more is a backdrop; the largest thing ever rendered covers 0.25
MAX_STRETCH = 1.4  # between the sides of the bounding box, which is square for every shape
MAX_HOLES = 0.04  # of the component's area
EDGE = 2.0  # contrast factor of edges before shapes are compared, so that soft edges do not change the shape
# Intersection over union with the best template: a hand-drawn circle is still a circle. A render stays 0.1 above this
# even when blurred by a 3x3 box at 64 pixels.
MIN_OVERLAP = {"circle": 0.83, "square": 0.79, "triangle": 0.75, "cross": 0.74}
MIN_LEAD = 0.03  # over the second best


@dataclass(frozen=True)
class Component:
    """A component: `shape` is None if no template fits; centre x, y and area are in units of the image.

    `colour` is a name of the palette, or "other", "faint" or "specks".
    """

    colour: str
    shape: str | None
    x: float
    y: float
    area: float


# For radius 1: the area, and the distance of the centroid below the centre; by shape, as in SHAPES.
_AREAS = (np.pi, 1.76**2, 1.9**2 / 2, 8 * CROSS_ARM - 4 * CROSS_ARM**2)
_SINK = (0.0, 0.0, 0.95 - 1.9 / 3, 0.0)


def _components(layer: np.ndarray) -> tuple[np.ndarray, int]:
    """(H, W) label of the connected component of each pixel of a mask, from 1; 0 outside the mask. And their number."""
    labels = np.zeros(layer.shape, dtype=np.int32)
    return labels, ndimage.label(layer, _NEIGHBOURS, labels)  # type: ignore[return-value]


def _holes(mask: np.ndarray) -> int:
    """Number of pixels enclosed by a component."""
    runs = np.count_nonzero(mask[:, 0]) + np.count_nonzero(mask[:, 1:] > mask[:, :-1])
    if runs == len(mask):
        return 0  # a hole would split a row in two
    padded = np.ones((mask.shape[0] + 2, mask.shape[1] + 2), dtype=bool)
    np.logical_not(mask, out=padded[1:-1, 1:-1])
    outside, _ = _components(padded)
    return int((outside > 1).sum())  # the padding, which is scanned first, is component 1


def _overlaps(share: np.ndarray) -> np.ndarray:
    """(shapes,) intersection over union of a component's soft mask with each template of the same area and centroid.

    Templates are matched by moments rather than the bounding box: blur keeps a triangle's area and centre, but not its
    apex.
    """
    (height, width), area = share.shape, max(float(share.sum()), 1e-6)
    pixels = np.arange(max(share.shape), dtype=np.float32)
    x = pixels[:width] - float(share.sum(0) @ pixels[:width]) / area
    y = pixels[:height] - float(share.sum(1) @ pixels[:height]) / area
    radii = [(area / unit) ** 0.5 for unit in _AREAS]
    distances = [distance(s, x, y + sink * r, r) for s, r, sink in zip(SHAPES, radii, _SINK, strict=True)]
    masks = coverage(np.array(distances), 1 / EDGE).reshape(len(SHAPES), -1)
    shared = np.minimum(share.ravel(), masks).sum(1)
    return shared / (area + masks.sum(1) - shared)


def _shape_of(mask: np.ndarray, share: np.ndarray) -> str | None:
    height, width = mask.shape
    if max(height, width) > MAX_STRETCH * min(height, width) or _holes(mask) > MAX_HOLES * np.count_nonzero(mask):
        return None
    *_, (second, _), (best, shape) = sorted(zip(_overlaps(share).tolist(), SHAPES, strict=True))
    return shape if best >= MIN_OVERLAP[shape] and best - second >= MIN_LEAD else None


def _share(patch: np.ndarray, core: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(h, w) position, 0 to 1, of each pixel of (3, h, w) between background and the component's colour.

    The contrast is raised by EDGE.
    """
    offset = core - background
    slope = offset * (EDGE / max(offset @ offset, 1e-6))
    raised = slope @ patch.reshape(3, -1) + (0.5 - EDGE / 2 - slope @ background)
    return np.minimum(np.maximum(raised, 0), 1).reshape(patch.shape[1:])


def _labels(planes: np.ndarray) -> np.ndarray:
    """(H, W) label of each pixel: 1 + the palette index of its colour, or 0 for background."""
    along = _DIRECTION @ (_LIGHT - planes.reshape(3, -1))
    best, colour = along.max(0), np.zeros(along.shape[1], dtype=np.int8)
    less = np.ones(along.shape[1], dtype=bool)
    for row in along:  # counts the rows before the first maximum; argmax takes four times as long
        less &= row < best
        colour += less
    covered = best / _LENGTH.take(colour) > MIN_COVER
    return ((colour + 1) * covered).reshape(planes.shape[1:])


def _median(planes: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(3,) median of the pixels in a mask; np.median takes several times as long for so few values."""
    values = planes.reshape(3, -1).compress(mask.ravel(), axis=1)
    number = values.shape[1]
    ordered = np.partition(values, number // 2, axis=1)
    high = ordered[:, number // 2]
    low = high if number % 2 else ordered[:, : number // 2].max(1)
    return (low + high) / 2


def _faint(planes: np.ndarray, empty: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(H, W) mask of pixels that differ from the background but have no colour, away from those that have one."""
    red, green, blue = np.square(planes - background[:, None, None])
    contrast, near = np.sqrt(red + green + blue), (~empty).view(np.uint8)
    reach = 2 * int(np.ceil(HALO * max(empty.shape))) + 1
    for axis in (0, 1):
        ndimage.uniform_filter1d(contrast, 3, axis, output=contrast)
        ndimage.maximum_filter1d(near, reach, axis, output=near)
    return (contrast > FAINT) & (near == 0)


def _colour(core: np.ndarray, index: int) -> str:
    """Name of the palette entry `index`, if a component's median colour is near it."""
    offset = core - _PALETTE[index]
    return _NAMES[index] if np.sqrt(offset @ offset) <= COLOUR_RADIUS else "other"


def _name(
    planes: np.ndarray, empty: np.ndarray, background: np.ndarray, index: int, mask: np.ndarray, box: tuple[slice, ...]
) -> tuple[str, str | None]:
    """Colour and shape of the component `mask` in `box`, whose pixels are nearest to palette entry `index`."""
    core = _median(planes[:, *box], mask)
    colour = _colour(core, index)
    if not MIN_READABLE <= np.count_nonzero(mask) / empty.size <= MAX_READABLE:
        return colour, None
    wide = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)  # includes the soft edge around the mask
    inner = tuple(slice(b.start - w.start, b.stop - w.start) for b, w in zip(box, wide, strict=True))
    own = empty[wide].copy()
    own[inner] |= mask  # excludes the pixels of other components
    return colour, _shape_of(mask, own * _share(planes[:, *wide], core, background))


Region = tuple[int, np.ndarray, tuple[slice, ...]]
"""A connected component: its label, its mask in its bounding box, and the box."""


def _regions(labels: np.ndarray) -> tuple[list[Region], np.ndarray]:
    """The connected components of each label that are no specks, and (H, W) the mask of all specks together."""
    found, specks = [], np.zeros(labels.shape, dtype=bool)
    for label, extent in enumerate(ndimage.find_objects(labels), start=1):
        if extent is None:
            continue
        layer = labels[extent] == label
        components, number = _components(layer)
        if number == 1 and np.count_nonzero(layer) / labels.size >= MIN_AREA:
            found.append((label, layer, extent))
            continue
        # Noise has hundreds of specks, so these are not looked at one by one.
        large = np.bincount(components.ravel()) / labels.size >= MIN_AREA
        specks[extent] |= layer & ~large[components]
        boxes = ndimage.find_objects(components)
        for region in np.flatnonzero(large[1:]):
            part = boxes[region]
            box = tuple(slice(e.start + p.start, e.start + p.stop) for e, p in zip(extent, part, strict=True))
            found.append((label, components[part] == region + 1, box))
    return found, specks


def _placed(mask: np.ndarray, box: tuple[slice, ...], labels: np.ndarray) -> tuple[float, float, float]:
    """Centre x, y and area of a mask in `box`, in units of the image."""
    (height, width), (rows, columns) = labels.shape, np.nonzero(mask)
    x = float(columns.sum() / len(columns) + box[1].start + 0.5) / width
    y = float(rows.sum() / len(rows) + box[0].start + 0.5) / height
    return x, y, len(rows) / labels.size


def find(image: np.ndarray) -> list[Component]:
    """Find all components of an image (H, W, 3) with values in [0, 1]."""
    planes = np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1))
    labels = _labels(planes)
    empty = labels == _BACKGROUND
    background = _median(planes, empty) if empty.any() else np.full(3, _LIGHT)
    np.putmask(labels, _faint(planes, empty, background), _FAINT)
    regions, specks = _regions(labels)
    things = []
    for label, mask, box in regions:
        name = ("faint", None) if label == _FAINT else _name(planes, empty, background, label - 1, mask, box)
        things.append(Component(*name, *_placed(mask, box, labels)))
    whole = tuple(slice(0, side) for side in labels.shape)
    if np.count_nonzero(specks) / labels.size >= MIN_AREA:
        things.append(Component("specks", None, *_placed(specks, whole, labels)))
    return things


def _relation_margin(spec: Spec, found: list[Component]) -> float:
    """Margin by which the relation holds, -1 to 1 in image sides; -1 unless each thing is exactly one component."""
    sides = [[f for f in found if (f.colour, f.shape) == thing] for thing in spec.things]
    if any(len(side) != 1 for side in sides):
        return -1.0
    (first,), (second,) = sides
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        spec.relation or ""
    ]
    return along if along > abs(across) else min(along, 0.0)


def _agreement(spec: Spec, found: list[Component]) -> float:
    """Best matching of things to components: 1 for two right attributes, ½ for one; divided by the longer length."""
    if not found:
        return 0.0
    worth = np.array(
        [[((f.colour == colour) + (f.shape == shape)) / 2 for f in found] for colour, shape in spec.things]
    )
    return float(worth[linear_sum_assignment(worth, maximize=True)].sum()) / max(worth.shape)


def verify(image: np.ndarray, spec: Spec) -> tuple[float, float]:
    """(strict, partial): strict is 1 if the image shows exactly the specification, else 0; partial is in [0, 1].

    For positions, partial is 0.7 times the agreement of the things plus 0.3 times the degree to which the relation
    holds, which is full from a margin of a fifth of the image.
    """
    found = find(image)
    agreement = _agreement(spec, found)
    if spec.relation is None:
        return float(agreement == 1.0), agreement
    margin = _relation_margin(spec, found)
    strict = agreement == 1.0 and margin > 0.1
    return float(strict), 0.7 * agreement + 0.3 * min(max((margin + 0.2) / 0.4, 0.0), 1.0) * (margin > -1)
