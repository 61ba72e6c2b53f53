"""GenEval's rules against tables of things made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from flowalign.rewards.geneval_rules import Rules, Task, Thing, correct, marks, overlap, partial, relations

SLACK = 0.1


def thing(name: str, x: float = 0, y: float = 0, side: float = 10, score: float = 0.95) -> Thing:
    """A square around (x, y)."""
    return Thing(name, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), score)


def task(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> Task:
    return Task.from_metadata({"tag": tag, "include": list(include), "exclude": list(exclude)})


def red(things: Sequence[Thing]) -> list[str | None]:
    """Everything is red."""
    return ["red" for _ in things]


def seen(*things: Thing, tag: str = "") -> dict[str, list[Thing]]:
    return Rules().select(things, tag)


TWO_DOGS = task("counting", {"class": "dog", "count": 2}, exclude=[{"class": "dog", "count": 3}])
A_DOG = task("single_object", {"class": "dog", "count": 1})


@pytest.mark.parametrize(
    ("asked", "number", "is_correct", "is_exact", "share"),
    [
        (TWO_DOGS, 0, False, False, 0.0),
        (TWO_DOGS, 1, False, False, 0.5),
        (TWO_DOGS, 2, True, True, 1.0),
        (TWO_DOGS, 3, False, False, 0.5),
        (TWO_DOGS, 4, False, False, 0.0),
        (TWO_DOGS, 9, False, False, 0.0),  # not below 0
        (A_DOG, 0, False, False, 0.0),
        (A_DOG, 1, True, True, 1.0),
        (A_DOG, 2, True, False, 0.0),  # the benchmark looks at the most confident one
    ],
)
def test_counts(asked: Task, number: int, is_correct: bool, is_exact: bool, share: float):
    found = {"dog": [thing("dog", 20 * i) for i in range(number)]}
    assert correct(asked, found, red, SLACK) is is_correct
    assert correct(asked, found, red, SLACK, exact=True) is is_exact
    assert partial(asked, found, red, SLACK) == share


def test_both_objects_must_be_there_and_one_of_two_is_half():
    both = task("two_object", {"class": "dog", "count": 1}, {"class": "cat", "count": 1})
    assert correct(both, seen(thing("dog"), thing("cat"), thing("tv")), red, SLACK)
    assert not correct(both, seen(thing("dog")), red, SLACK)
    assert partial(both, seen(thing("dog")), red, SLACK) == 0.5


def test_colours_count_only_on_the_right_number_and_only_the_most_confident_are_asked():
    asked: list[list[float]] = []

    def namer(things: Sequence[Thing]) -> list[str | None]:
        asked.append([t.score for t in things])
        return ["red" if t.score > 0.8 else "blue" for t in things]

    one = task("colors", {"class": "car", "count": 1, "color": "red"})
    found = seen(thing("car", score=0.5), thing("car", 50, score=0.9))
    assert correct(one, found, namer, SLACK)
    assert asked == [[0.9]]
    assert marks(one, found, namer, SLACK, exact=True) == [0.0, 0.0]
    assert marks(one, seen(thing("car", score=0.5)), namer, SLACK, exact=True) == [1.0, 0.0]
    two = task("colors", {"class": "car", "count": 2, "color": "red"})
    assert partial(two, found, namer, SLACK) == 0.75  # both there, one of them red


# dog = 10 wide at (0, 0); cat = 10 wide at (x, y): an offset counts beyond 0.1 · (10 + 10) = 2 pixels.
@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0, 0, set()),
        (2, 0, set()),  # exactly the slack
        (3.9, 0, set()),  # (3.9 - 2) / 3.9 < ½
        (4.1, 0, {"right of"}),
        (-4.1, 0, {"left of"}),
        (0, 4.1, {"below"}),
        (0, -4.1, {"above"}),
        (20, 5, {"right of"}),
        (20, 20, {"right of", "below"}),
        (-20, -20, {"left of", "above"}),
        (20, 11, {"right of"}),  # (11 - 2) / 22.8 < ½
        (20, 16, {"right of", "below"}),
    ],
)
def test_relations_need_distance_beyond_the_slack_and_half_of_the_offset(x: float, y: float, expected: set[str]):
    assert relations(thing("cat", x, y), thing("dog"), SLACK) == expected


def test_a_relation_is_read_from_the_anchor_that_has_matched():
    asked = task("position", {"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]})
    left = seen(thing("dog", 40), thing("cat", 0))
    assert correct(asked, left, red, SLACK)
    assert marks(asked, left, red, SLACK, exact=True) == [1, 1, 1]
    assert marks(asked, seen(thing("dog", 0), thing("cat", 40)), red, SLACK, exact=True) == [1, 1, 0]
    assert marks(asked, seen(thing("cat", 0)), red, SLACK, exact=True) == [0, 1, 0]
    more = seen(thing("dog", 40), thing("dog", -40), thing("cat", 0))
    assert marks(asked, more, red, SLACK, exact=True) == [0, 1, 0]  # two dogs are not the one that was asked for
    assert marks(asked, more, red, SLACK, exact=False) == [1, 1, 1]


def test_a_thing_of_the_wrong_colour_is_no_anchor():
    asked = task(
        "color_attr",
        {"class": "dog", "count": 1, "color": "blue"},
        {"class": "cat", "count": 1, "position": ["left of", 0]},
    )
    assert marks(asked, seen(thing("dog", 40), thing("cat", 0)), red, SLACK, exact=False) == [1, 0, 1, 0]


def test_confidence_is_stricter_for_counting_and_a_threshold_is_itself_too_little():
    found = [thing("dog", score=0.9), thing("dog", 30, score=0.91), thing("dog", 60, score=0.3)]
    assert [t.score for t in Rules().select(found, "counting")["dog"]] == [0.91]
    assert [t.score for t in Rules().select(found, "colors")["dog"]] == [0.91, 0.9]


def test_the_less_confident_of_two_overlapping_things_goes_if_that_is_wanted():
    one, same, apart = thing("dog", 0, score=0.9), thing("dog", 2, score=0.8), thing("dog", 30, score=0.7)
    assert overlap(one, same) == pytest.approx(80 / 120)
    assert overlap(one, apart) == 0
    other = thing("cat", 0, score=0.6)  # of another class: never the same thing
    assert len(Rules().select([one, same, apart, other], "")["dog"]) == 3
    kept = Rules(max_overlap=0.5).select([same, other, apart, one], "")
    assert kept == {"dog": [one, apart], "cat": [other]}
    assert len(Rules(max_overlap=0.7).select([one, same], "")["dog"]) == 2


def test_only_the_most_confident_of_a_class_are_kept():
    found = [thing("dog", 20 * i, score=0.4 + i / 100) for i in range(20)]
    assert [t.score for t in Rules().select(found, "")["dog"]] == sorted((t.score for t in found), reverse=True)[:16]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"tag": "single_object"}, "geneval needs metadata in GenEval's layout"),
        ({"include": []}, "geneval needs metadata in GenEval's layout"),
        ({"include": [{"count": 1}]}, "needs a `class`"),
        ({"include": [{"class": "dog", "count": 0}]}, "`count` must be a whole number"),
        ({"include": [{"class": "dog", "count": "two"}]}, "`count` must be a whole number"),
        ({"include": [{"class": "dog", "color": "beige"}]}, "`color` must be one of red"),
        ({"include": [{"class": "dog", "position": ["left of", 0]}]}, "number of an earlier entry"),
        ({"include": [{"class": "dog"}, {"class": "cat", "position": ["near", 0]}]}, "must be a relation"),
        ({"include": [{"class": "dog"}, {"class": "cat", "position": "left of"}]}, "must be a relation"),
    ],
)
def test_metadata_of_another_layout_are_refused_with_the_reason(record: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        Task.from_metadata(record)


def test_a_line_of_the_benchmark_is_read():
    line = (
        '{"tag": "position", "include": [{"class": "tv", "count": 1}, {"class": "dog", "count": 1, '
        '"position": ["above", 0]}], "prompt": "a photo of a dog above a tv"}'
    )
    read = Task.from_metadata(json.loads(line))
    assert read.names == ["tv", "dog"]
    assert (read.include[1].relation, read.include[1].anchor, read.exclude) == ("above", 0, ())
