"""The rules of GenEval (arXiv:2310.11513): what a prompt asks for, and how far the detected objects satisfy it.

Nothing here looks at images: a detector provides the objects, and a callable names their colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"
"""Tag of prompts that require a higher confidence."""


@dataclass(frozen=True)
class Thing:
    """A detected object."""

    name: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in pixels; y grows downwards."""
    score: float
    mask: Tensor | None = None
    """(H, W) bool, if the detector segments."""


@dataclass(frozen=True)
class Entry:
    """`count` objects of a class, optionally of a colour, optionally in a relation to the earlier entry `anchor`."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    anchor: int = 0


@dataclass(frozen=True)
class Task:
    """What a prompt asks for, in GenEval's layout."""

    tag: str
    include: tuple[Entry, ...]
    exclude: tuple[Entry, ...] = ()
    """`count` or more objects of such a class are wrong."""

    @property
    def names(self) -> list[str]:
        """All classes that matter, without duplicates."""
        return list(dict.fromkeys(entry.name for entry in (*self.include, *self.exclude)))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Task:
        """Parse `tag`, `include` and optionally `exclude`. Raises ValueError with the reason if they are malformed."""
        include = metadata.get("include")
        if not isinstance(include, list) or not include:
            raise ValueError(
                "geneval needs metadata in GenEval's layout with every prompt: `tag`, and `include`, a list of entries "
                f"with class, count and perhaps color and position; got {dict(metadata)!r}"
            )
        entries = tuple(_entry(record, place) for place, record in enumerate(include))
        exclude = tuple(_entry(record, len(entries)) for record in metadata.get("exclude") or [])
        return cls(str(metadata.get("tag", "")), entries, exclude)


def _entry(record: Any, place: int) -> Entry:
    """Parse an entry. place: its index in the list; `position` may refer to earlier entries only."""
    if not isinstance(record, dict) or not isinstance(record.get("class"), str):
        raise ValueError(f"an entry needs a `class`, a text; got {record!r}")
    count, colour = record.get("count", 1), record.get("color")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"`count` must be a whole number of at least 1; got {record!r}")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"`color` must be one of {', '.join(COLOURS)}; got {record!r}")
    if "position" not in record:
        return Entry(record["class"], count, colour)
    match record["position"]:
        case [str(relation), int(anchor)] if relation in RELATIONS and 0 <= anchor < place:
            return Entry(record["class"], count, colour, relation, anchor)
    raise ValueError(
        f"`position` must be a relation ({', '.join(RELATIONS)}) and the number of an earlier entry, from 0; "
        f"got {record!r}"
    )


@dataclass(frozen=True)
class Rules:
    """Thresholds of the benchmark, tuned for its Mask2Former; other detectors need other values."""

    threshold: float = 0.3
    """Confidence above which an object counts …"""
    counting_threshold: float = 0.9
    """… and for prompts with the tag `counting`."""
    max_objects: int = 16
    """Number of most confident objects kept per class."""
    max_overlap: float = 1.0
    """IoU from which the less confident of two objects of a class is dropped as a duplicate; 1 = never."""
    slack: float = 0.1
    """Minimum distance of two objects along an axis for a relation to hold, relative to the sum of their sizes."""

    def select(self, things: Sequence[Thing], tag: str) -> dict[str, list[Thing]]:
        """The objects that count, by class, in order of decreasing confidence."""
        floor = self.counting_threshold if tag == COUNTING else self.threshold
        ordered = sorted((t for t in things if t.score > floor), key=lambda t: -t.score)
        kept: dict[str, list[Thing]] = {}
        for name in dict.fromkeys(thing.name for thing in ordered):
            kept[name] = self._suppress_overlaps([t for t in ordered if t.name == name][: self.max_objects])
        return kept

    def _suppress_overlaps(self, things: list[Thing]) -> list[Thing]:
        kept: list[Thing] = []
        for thing in things:
            if self.max_overlap >= 1 or all(overlap(thing, other) < self.max_overlap for other in kept):
                kept.append(thing)
        return kept


def overlap(a: Thing, b: Thing) -> float:
    """Intersection over union of two boxes."""
    width = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    height = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in (a, b)]
    return shared / (sum(areas) - shared) if shared else 0.0


def relations(a: Thing, b: Thing, slack: float) -> set[str]:
    """Position of a relative to b: none, one, or on a diagonal two of RELATIONS.

    The offset between the centres is shortened along each axis by `slack` times the sum of both sizes. A relation holds
    along an axis where the shortened offset exceeds half the length of the full one.
    """
    offset = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in (0, 1)]
    sizes = [a.box[i + 2] - a.box[i] + b.box[i + 2] - b.box[i] for i in (0, 1)]
    left = [math.copysign(max(abs(o) - slack * s, 0.0), o) for o, s in zip(offset, sizes, strict=True)]
    if max(map(abs, left)) < 1e-3:  # pixels: the centres coincide
        return set()
    x, y = (value / math.hypot(*offset) for value in left)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


ColoursOf = Callable[[Sequence[Thing]], Sequence[str | None]]
"""Names the colours of objects of one class; None if a colour is not one of COLOURS."""


def marks(task: Task, seen: Mapping[str, list[Thing]], colours: ColoursOf, slack: float, exact: bool) -> list[float]:
    """Mark in [0, 1] for every demand of the task: of each entry the count, then if asked its colour and its position.

    exact: surplus objects count, 1 - |n - count| / count (Flow-GRPO, arXiv:2505.05470, section 4); otherwise only the
    `count` most confident objects are considered, as in the benchmark. A colour earns 0 if the count is wrong, and a
    position earns 0 if the count, the colour or the anchor is wrong.
    """
    earned: list[float] = []
    matched: list[list[Thing] | None] = []
    for entry in task.include:
        found = seen.get(entry.name, [])
        things = found if exact else found[: entry.count]
        own = [max(1 - abs(len(things) - entry.count) / entry.count, 0.0)]
        if entry.colour is not None:
            right = sum(colour == entry.colour for colour in colours(things)) if own[0] == 1 else 0
            own.append(right / entry.count)
        if entry.relation is not None:
            anchors = matched[entry.anchor]
            fine = anchors is not None and min(own) == 1
            own.append(float(fine and _related(things, anchors or [], entry.relation, slack)))
        matched.append(things if min(own) == 1 else None)
        earned += own
    return earned


def _related(things: Sequence[Thing], anchors: Sequence[Thing], relation: str, slack: float) -> bool:
    return all(relation in relations(thing, anchor, slack) for thing in things for anchor in anchors)


def correct(task: Task, seen: Mapping[str, list[Thing]], colours: ColoursOf, slack: float, exact: bool = False) -> bool:
    """Whether everything requested is present and nothing excluded; exact: and without surplus objects."""
    too_many = any(len(seen.get(entry.name, [])) >= entry.count for entry in task.exclude)
    return not too_many and min(marks(task, seen, colours, slack, exact)) == 1


def partial(task: Task, seen: Mapping[str, list[Thing]], colours: ColoursOf, slack: float) -> float:
    """Mean of the exact marks: rewards partial success."""
    earned = marks(task, seen, colours, slack, exact=True)
    return sum(earned) / len(earned)
