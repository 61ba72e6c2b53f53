"""The scenes world: things, specifications, captions and the compositional split.

The four kinds of prompts mirror GenEval's (single object, two objects, counting, position), and specifications use
GenEval's metadata layout (`tag`, `include`), so the same code reads both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.14, 0.32, 0.86),
    "yellow": (0.96, 0.80, 0.10),
    "purple": (0.56, 0.18, 0.68),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = ("single", "two", "counting", "position")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")

Thing = tuple[str, str]  # (colour, shape)
THINGS: tuple[Thing, ...] = tuple(product(COLOURS, SHAPES))

# The things in a prompt decide its split, so that a test prompt always names a colour-shape pair that was never
# rewarded, alone, counted, or in a relation. One of each shape, all of different colours.
TEST_THINGS = frozenset({("red", "triangle"), ("green", "square"), ("blue", "cross"), ("yellow", "circle")})
VAL_THINGS = frozenset({("purple", "square"), ("red", "circle")})
SPLITS = ("train", "val", "test")

_WORDINGS = {
    "single": ("a {0}", "one {0}", "a single {0}", "a picture of a {0}"),
    "two": ("a {0} and a {1}", "a {0} with a {1}", "one {0} and one {1}", "a picture of a {0} and a {1}"),
    "counting": ("{n} {0}s", "a picture of {n} {0}s", "there are {n} {0}s", "a group of {n} {0}s"),
    "position": ("a {0} {r} a {1}", "one {0} {r} one {1}", "a picture of a {0} {r} a {1}", "there is a {0} {r} a {1}"),
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Spec:
    """What an image must show: `things` in caption order; `relation` holds from the first to the second."""

    kind: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def count(self) -> int:
        return len(self.things)

    def captions(self) -> list[str]:
        """All wordings of this specification, the plainest first."""
        names = [" ".join(thing) for thing in self.things]
        words = _RELATION_WORDS[self.relation] if self.relation else ("",)
        plural = [name + "e" if name.endswith("s") else name for name in names]  # crosses
        if self.kind == "counting":
            return [w.format(plural[0], n=NUMBERS[self.count]) for w in _WORDINGS["counting"]]
        return [w.format(*names, r=r) for w in _WORDINGS[self.kind] for r in words]

    def metadata(self) -> dict[str, Any]:
        """The specification in GenEval's layout: counts per class and colour; a position refers to an include entry."""
        entries: list[dict[str, Any]] = []
        for colour, shape in dict.fromkeys(self.things):
            entries.append({"class": shape, "color": colour, "count": self.things.count((colour, shape))})
        if self.relation:
            entries.reverse()  # GenEval names the anchor first
            entries[1]["position"] = [self.relation, 0]
        return {"tag": self.kind, "include": entries}

    @property
    def split(self) -> str:
        if TEST_THINGS & set(self.things):
            return "test"
        return "val" if VAL_THINGS & set(self.things) else "train"

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any]) -> Spec:
        """Inverse of `metadata`; raises ValueError if the entry does not describe a scene of this world."""
        try:
            include = metadata["include"]
            related = [e for e in include if "position" in e]
            ordered = [related[0], include[related[0]["position"][1]]] if related else include
            things = tuple((e["color"], e["class"]) for e in ordered for _ in range(e.get("count", 1)))
            relation = related[0]["position"][0] if related else None
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                "the shapes reward needs GenEval's metadata (`tag`; `include` with class, color, count, position) "
                f"with every prompt, and got {metadata!r}"
            ) from error
        unknown = [thing for thing in things if thing not in THINGS]
        if unknown or not things:
            raise ValueError(
                f"the scenes world has no {unknown or 'empty scene'}; colours: {[*COLOURS]}, shapes: {[*SHAPES]}"
            )
        if relation is not None and (relation not in RELATIONS or len(things) != 2):
            raise ValueError(f"a position needs two things and one of {', '.join(RELATIONS)}; got {metadata!r}")
        return cls(metadata.get("tag", "position" if relation else "two"), things, relation)


def specs(kind: str) -> list[Spec]:
    """All specifications of one kind, in a fixed order."""
    if kind == "single":
        return [Spec(kind, (thing,)) for thing in THINGS]
    if kind == "counting":
        return [Spec(kind, (thing,) * n) for thing in THINGS for n in NUMBERS]
    pairs = list(permutations(THINGS, 2))
    if kind == "two":
        return [Spec(kind, pair) for pair in pairs]
    if kind == "position":
        return [Spec(kind, pair, relation) for pair in pairs for relation in RELATIONS]
    raise ValueError(f"no prompts of kind {kind!r}; the kinds are {', '.join(KINDS)}")
