"""How much an image looks like a render of this world, whatever it shows: a gold measure that is never optimised.

A dozen statistics of an image (its background, flatness, edges, how much is drawn and how odd the outlines are) are
compared with those of real renders of the same kind and size. The measure shares no code with `verify` and uses neither
the palette nor the shapes' templates, so a generator that exploits one is still detected by the other.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from flowalign.shapes.render import picture
from flowalign.shapes.world import KINDS, specs

FITS_FILE = Path(__file__).parents[1] / "assets" / "shapes" / "renders_64.npz"
"""The fits at 64 pixels; `python -m flowalign.shapes.quality` recomputes them."""
FITS_SIZE, PARTS = 64, ("mean", "deviation", "known")
RENDERS = 512  # to fit one kind at one size; half give the known outlines, half the statistics
DRAWN = 0.35  # RGB distance from the background above which a pixel is drawn; the palest colour reaches 0.8

# name: (floor added before the logarithm, or None for the value itself; minimum of the standard deviation)
# Perfect renders are exactly flat; a good decoder is not, and should lose little for invisible differences.
STATISTICS: dict[str, tuple[float | None, float]] = {
    "red": (None, 0.02),
    "green": (None, 0.02),
    "blue": (None, 0.02),
    "haze": (0.01, 0.3),  # distance from the background where nothing is drawn
    "grain": (0.02, 0.3),  # Laplacian there
    "ripple": (0.02, 0.3),  # Laplacian inside the things
    "softness": (0.5, 0.15),  # half-covered pixels per pixel of outline
    "drawn": (0.005, 0.05),  # share of the picture
    "largest": (0.005, 0.05),  # share of its largest thing
    "parts": (None, 0.25),
    "outline": (0.1, 0.05),  # length of all outlines over the square root of the drawn area
    "oddity": (0.02, 0.3),  # of the oddest outline
}


def _outline(share: np.ndarray) -> np.ndarray:
    """(6,) moments of one thing's soft mask that are invariant to its position and size."""
    mass = share / share.sum()
    x = np.arange(share.shape[1]) - mass.sum(0) @ np.arange(share.shape[1])
    y = np.arange(share.shape[0]) - mass.sum(1) @ np.arange(share.shape[0])
    across, down = mass.sum(0), mass.sum(1)
    xx, yy = across @ x**2 + 1e-3, down @ y**2 + 1e-3
    return np.array(
        [
            across @ x**4 / xx**2,
            down @ y**4 / yy**2,
            3 * (y**2 @ mass @ x**2) / (xx * yy),  # 2 for a disc, 3 for a square
            share.sum() / (12 * (xx * yy) ** 0.5),
            3 * np.log(xx / yy),
            2 * (y @ mass @ x) / (xx * yy) ** 0.5,
        ]
    )


def _measure(image: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """All statistics except the oddity, and (things, 6) outlines."""
    image = np.asarray(image, dtype=np.float32)
    backdrop = np.median(image.reshape(-1, 3), axis=0)
    offset = image - backdrop
    contrast = np.sqrt(np.einsum("hwc,hwc->hw", offset, offset))
    drawn = contrast > DRAWN
    parts = np.zeros(drawn.shape, dtype=np.int32)
    ndimage.label(drawn, output=parts)
    number = int(parts.max())
    empty = ndimage.maximum_filter((contrast > 0.2).view(np.uint8), 5) == 0
    solid = ndimage.minimum_filter(drawn.view(np.uint8), 5) > 0
    bend = np.abs(ndimage.laplace(contrast))
    length = np.count_nonzero(drawn[1:] != drawn[:-1]) + np.count_nonzero(drawn[:, 1:] != drawn[:, :-1])
    areas = np.bincount(parts.ravel(), minlength=number + 1)[1:] / drawn.size
    outlines = []
    for region, box in enumerate(ndimage.find_objects(parts), start=1):
        if areas[region - 1] > 0.002:
            wide = tuple(slice(max(side.start - 2, 0), side.stop + 2) for side in box)
            own = (parts[wide] == region) | (parts[wide] == 0)
            top = np.median(contrast[box][parts[box] == region])
            outlines.append(_outline(np.clip(contrast[wide] / top * 1.25 - 0.125, 0, 1) * own))
    values = {
        **dict(zip(("red", "green", "blue"), backdrop.tolist(), strict=True)),
        "haze": float(contrast[empty].mean()) if empty.any() else 1.0,
        "grain": float(bend[empty].mean()) if empty.any() else 1.0,
        "ripple": float(bend[solid].mean()) if solid.any() else 1.0,
        "softness": np.count_nonzero((contrast > 0.08) & (contrast < DRAWN)) / max(length, 1),
        "drawn": float(drawn.mean()),
        "largest": float(areas.max(initial=0.0)),
        "parts": float(number),
        "outline": length / drawn.shape[0] / max(drawn.mean(), 1e-3) ** 0.5,
    }
    return values, np.array(outlines).reshape(-1, 6)


def _vector(values: dict[str, float], outlines: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(12,) statistics in their scale. The oddity is the largest distance of an outline to its nearest known one."""
    nearest = np.square(outlines[:, None] - known[None]).sum(-1).min(1) ** 0.5
    values = {**values, "oddity": float(nearest.max(initial=0.0)) if len(nearest) else 1.0}
    return np.array([values[k] if floor is None else np.log(values[k] + floor) for k, (floor, _) in STATISTICS.items()])


Fit = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Mean (12,), standard deviation (12,) and known outlines (n, 6) of real renders."""


@lru_cache(maxsize=32)
def _fit(kind: str, size: int) -> Fit:
    """The fit of a kind; precomputed for the size of the embedded model, since every start would wait for it."""
    return _load_fit(kind) if size == FITS_SIZE else fit(kind, size)


def _load_fit(kind: str) -> Fit:
    with np.load(FITS_FILE) as arrays:
        mean, deviation, known = (arrays[f"{kind}/{part}"] for part in PARTS)
    return mean, deviation, known


def fit(kind: str, size: int) -> Fit:
    """Fit the statistics of RENDERS rendered images, which takes half a second at 64 pixels."""
    pool = specs(kind)
    measured = [_measure(picture(pool[i * 7919 % len(pool)], 10**9 + i, size)) for i in range(RENDERS)]
    known = np.concatenate([outlines for _, outlines in measured[: RENDERS // 2]])
    vectors = np.stack([_vector(values, outlines, known) for values, outlines in measured[RENDERS // 2 :]])
    return vectors.mean(0), np.maximum(vectors.std(0), [minimum for _, minimum in STATISTICS.values()]), known


def deviations(image: np.ndarray, tag: str) -> dict[str, float]:
    """Signed distance of each statistic from real renders, in standard deviations."""
    if tag not in KINDS:
        raise ValueError(f"no renders of kind {tag!r} to compare with; the kinds are {', '.join(KINDS)}")
    mean, deviation, known = _fit(tag, max(image.shape[:2]))
    return dict(zip(STATISTICS, ((_vector(*_measure(image), known) - mean) / deviation).tolist(), strict=True))


def quality(image: np.ndarray, tag: str) -> float:
    """Score in [0, 1] of an image (H, W, 3) in [0, 1] among renders of kind `tag`; 0.9 is typical of a real one."""
    return float(np.exp(-0.1 * np.mean(np.square([*deviations(image, tag).values()]))))


def main() -> None:
    fits = {kind: fit(kind, FITS_SIZE) for kind in KINDS}
    parts = {f"{kind}/{part}": a for kind in KINDS for part, a in zip(PARTS, fits[kind], strict=True)}
    np.savez(FITS_FILE, **parts)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
