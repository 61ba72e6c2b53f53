from dataclasses import replace

import numpy as np
import pytest
from drawing import LIGHT, blurred, canvas, colour_of, draw, paint, specks, superellipse

from flowalign.shapes.render import Placed, picture, place
from flowalign.shapes.verify import find, verify
from flowalign.shapes.world import COLOURS, KINDS, SHAPES, THINGS, Spec, specs

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scenes(kind: str, number: int) -> list[tuple[Spec, int]]:
    """Specifications of one kind, spread evenly, each with a seed of its own."""
    pool = specs(kind)
    return [(pool[i * 7919 % len(pool)], i) for i in range(number)]


def others(colour: str, shape: str) -> tuple[str, str]:
    """A colour and a shape that are not these."""
    names = [*COLOURS]
    return names[(names.index(colour) + 1) % len(names)], SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]


def wrong(spec: Spec) -> list[Spec]:
    """Specifications that no picture of `spec` satisfies.

    A position entails the plain pair, and the mirrored relation of the swapped pair: neither is here. A pair may or
    may not satisfy a position by accident, so pairs are not asked for positions.
    """
    (colour, shape), *rest = spec.things
    new_colour, new_shape = others(colour, shape)
    if spec.kind == "counting":
        swapped = [replace(spec, things=(thing,) * spec.count) for thing in ((new_colour, shape), (colour, new_shape))]
        return swapped + [replace(spec, things=spec.things[:1] * n) for n in (spec.count - 1, spec.count + 1)]
    out = [
        replace(spec, things=(thing, *rest))
        for thing in ((new_colour, shape), (colour, new_shape))
        if thing not in rest
    ]
    out += [Spec("two", (*spec.things, spec.things[0]))]
    if rest:
        out.append(Spec("single", spec.things[:1]))
        crossed = ((rest[0][0], shape), (colour, rest[0][1]))  # the right colours and shapes, given to each other
        if set(crossed) != set(spec.things):
            out.append(replace(spec, things=crossed))
    if spec.relation:
        out += [replace(spec, relation=other) for other in OPPOSITE if other != spec.relation]
        out += [replace(spec, things=spec.things[::-1])]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "number"), [(64, 1000), (128, 60)])
def test_renders_are_what_they_were_drawn_as(kind, size, number):
    scores = np.array([verify(picture(spec, seed, size), spec) for spec, seed in scenes(kind, number)])
    assert scores[:, 0].mean() >= 0.995
    assert (scores[scores[:, 0] == 1, 1] == 1).all()
    assert (scores >= 0).all()
    assert (scores <= 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_captions_are_refused(kind):
    scores = np.array([verify(image, w) for s, i in scenes(kind, 40) for image in [picture(s, i)] for w in wrong(s)])
    assert scores[:, 0].mean() <= 0.01
    assert (scores >= 0).all()
    assert (scores < 1).all()


def test_a_position_satisfies_its_pair_and_the_mirrored_relation():
    for spec, seed in scenes("position", 60):
        image, swapped = picture(spec, seed), spec.things[::-1]
        assert verify(image, Spec("two", spec.things)) == (1.0, 1.0)
        assert verify(image, Spec("two", swapped)) == (1.0, 1.0)
        assert verify(image, Spec("position", swapped, OPPOSITE[spec.relation or ""]))[0] == 1.0


def test_find_reports_colour_shape_centre_and_area():
    (circle,) = find(draw([Placed(("blue", "circle"), 0.3, 0.6, 0.2)]))
    assert (circle.colour, circle.shape) == ("blue", "circle")
    assert np.allclose([circle.x, circle.y, circle.area], [0.3, 0.6, np.pi * 0.04], atol=0.005)


def test_an_empty_picture_shows_nothing():
    assert find(canvas()) == []
    assert find(canvas(128)) == []
    assert verify(canvas(), specs("single")[0]) == (0.0, 0.0)


# ---------------------------------------------------------------- planted errors


def planted(placed: list[Placed]) -> dict[str, list[Placed]]:
    first, *rest = placed
    colour, shape = first.thing
    new_colour, new_shape = others(colour, shape)
    errors = {
        "wrong colour": [replace(first, thing=(new_colour, shape)), *rest],
        "wrong shape": [replace(first, thing=(colour, new_shape)), *rest],
        "removed": rest,
    }
    spots = [(x, y) for x in np.linspace(0.15, 0.85, 15) for y in np.linspace(0.15, 0.85, 15)]
    free = [s for s in spots if all(max(abs(s[0] - p.x), abs(s[1] - p.y)) > p.radius + 0.15 for p in placed)]
    if free:
        errors |= {
            "one more": [*placed, Placed(first.thing, *free[0], 0.11)],
            "a stranger": [*placed, Placed(("green", "cross"), *free[-1], 0.11)],
        }
    return errors


@pytest.mark.parametrize("kind", KINDS)
def test_every_planted_error_costs_the_strict_score_and_part_of_the_partial_one(kind):
    seen = set()
    for spec, seed in scenes(kind, 40):
        placed = place(spec, np.random.default_rng(seed))
        assert verify(draw(placed), spec) == (1.0, 1.0)
        for name, error in planted(placed).items():
            strict, partial = verify(draw(error), spec)
            assert strict == 0, name
            assert partial < 1, name
            seen.add(name)
    assert len(seen) == 5


def test_a_reversed_relation_costs_its_share():
    for spec, seed in scenes("position", 40):
        first, second = place(spec, np.random.default_rng(seed))
        reversed_ = [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)]
        reversed_ = [replace(p, radius=0.13) for p in reversed_]
        strict, partial = verify(draw(reversed_), spec)
        assert strict == 0
        assert np.isclose(partial, 0.7)


def test_a_second_error_never_pays():
    spec = Spec("two", (("red", "circle"), ("blue", "square")))
    places = (0.25, 0.3, 0.14), (0.7, 0.65, 0.14)

    def score(*things):
        return verify(draw([Placed(t, *p) for t, p in zip(things, places, strict=False)]), spec)[1]

    right, one = score(*spec.things), score(("red", "cross"), ("blue", "square"))
    two = score(("red", "cross"), ("green", "square"))
    assert 1 == right > one > two > score(("green", "triangle"), ("purple", "cross")) == 0
    assert score(*spec.things[:1]) == 0.5


def test_half_credit_does_not_depend_on_the_order_of_the_picture():
    spec = Spec("two", (("red", "circle"), ("red", "square")))
    right_colour, right_shape = Placed(("red", "cross"), 0.3, 0.3, 0.15), Placed(("blue", "circle"), 0.7, 0.7, 0.15)
    swapped = [replace(right_colour, x=0.7, y=0.7), replace(right_shape, x=0.3, y=0.3)]
    assert verify(draw([right_colour, right_shape]), spec)[1] == verify(draw(swapped), spec)[1] == 0.5


# ---------------------------------------------------------------- robustness


@pytest.mark.parametrize("kind", KINDS)
def test_mild_noise_and_blur_do_not_matter(kind):
    rng, chosen = np.random.default_rng(0), scenes(kind, 100)
    noisy = [verify(np.clip(picture(s, i) + rng.normal(0, 0.02, (64, 64, 3)), 0, 1), s)[0] for s, i in chosen]
    soft = [verify(blurred(picture(s, i)), s)[0] for s, i in chosen]
    assert np.mean(noisy) >= 0.97
    assert np.mean(soft) >= 0.97


# ---------------------------------------------------------------- what an optimiser might try instead


CIRCLE, SQUARE = Spec("single", (("red", "circle"),)), Spec("single", (("red", "square"),))


def refused(image: np.ndarray, *asked: Spec) -> bool:
    return all(verify(image, spec)[0] == 0 and verify(image, spec)[1] < 1 for spec in asked or (CIRCLE, SQUARE))


@pytest.mark.parametrize("radius", [0.1, 0.14, 0.2])
def test_a_stretched_circle_is_no_circle(radius):
    assert refused(paint(canvas(), superellipse(64, 0.5, 0.5, 1.5 * radius, radius), "red"))
    assert refused(paint(canvas(), superellipse(64, 0.5, 0.5, radius, 1.5 * radius), "red"))


@pytest.mark.parametrize("radius", [0.15, 0.18, 0.25])  # at eight pixels or less the grid decides
def test_between_circle_and_square_there_is_neither(radius):
    assert refused(paint(canvas(), superellipse(64, 0.5, 0.5, radius, radius, 4.0), "red"))


def test_a_turned_square_is_no_square():
    axis = (np.arange(64) + 0.5) / 64 - 0.5
    diamond = (abs(axis[None, :]) + abs(axis[:, None]) < 0.25).astype(np.float32)
    assert refused(paint(canvas(), diamond, "red"), *(Spec("single", (("red", shape),)) for shape in SHAPES))


def test_a_triangle_on_its_head_is_no_triangle():
    assert refused(draw([Placed(("red", "triangle"), 0.5, 0.5, 0.2)])[::-1], Spec("single", (("red", "triangle"),)))


@pytest.mark.parametrize("side", [1, 2, 4])
def test_strewn_specks_are_not_ignored(side):
    image = draw([Placed(("red", "circle"), 0.5, 0.5, 0.2)])
    assert verify(image, CIRCLE) == (1.0, 1.0)
    assert refused(specks(image, 32 // side**2 + 1, side, "blue"))
    assert verify(specks(image, 1, 2, "blue"), CIRCLE)[0] == 1  # one slip of four pixels is not an object


def test_specks_of_all_colours_are_one_thing_at_their_common_centre():
    image = draw([Placed(("red", "circle"), 0.5, 0.5, 0.2)])
    strewn = specks(specks(specks(image, 5, 2, "blue", 1), 4, 2, "green", 2), 3, 1, "red", 3)  # red, as the circle
    rows, columns = np.nonzero((strewn != image).any(-1))
    circle, together = find(strewn)
    assert (circle.colour, circle.shape) == ("red", "circle")
    assert (together.colour, together.shape) == ("specks", None)
    assert together.area == len(rows) / 64**2 == (9 * 4 + 3) / 64**2
    assert together.x == pytest.approx((columns.mean() + 0.5) / 64)
    assert together.y == pytest.approx((rows.mean() + 0.5) / 64)


@pytest.mark.parametrize("strength", [0.2, 0.3, 0.44])
@pytest.mark.parametrize("name", ["red", "green", "blue", "purple"])
def test_a_faint_second_object_counts(strength, name):
    image = draw([Placed(("red", "circle"), 0.3, 0.3, 0.17)])
    ghost = paint(image, superellipse(64, 0.7, 0.7, 0.13, 0.13), name, strength)
    assert refused(ghost)
    assert {f.colour for f in find(ghost)} == {"red", "faint"}


def test_a_uniform_background_of_any_light_tint_is_background():
    for tint in ((0.88, 0.92, 1.0), (1.0, 1.0, 1.0), (0.88, 0.88, 0.88)):
        image = paint(np.broadcast_to(np.array(tint), (64, 64, 3)), superellipse(64, 0.5, 0.5, 0.2, 0.2), "red")
        assert verify(image, CIRCLE)[0] == 1


@pytest.mark.parametrize("thing", THINGS)
def test_a_picture_full_of_one_colour_is_no_thing(thing):
    full = np.broadcast_to(colour_of(thing[0]), (64, 64, 3))
    assert refused(full, Spec("single", (thing,)))
    assert refused(paint(canvas(), np.pad(np.ones((60, 60)), 2), thing[0]), Spec("single", (thing,)))


@pytest.mark.parametrize(
    "colour", [(0, 0, 0), (0.5, 0.5, 0.5), (0.95, 0.6, 0.6), (0.4, 0.05, 0.05), (0.95, 0.5, 0.1), (0.1, 0.7, 0.7)]
)
def test_black_grey_pale_dark_and_mixed_colours_have_no_name(colour):
    image = paint(canvas(), superellipse(64, 0.5, 0.5, 0.2, 0.2), colour)
    assert refused(image, *(Spec("single", ((name, "circle"),)) for name in COLOURS))


def test_rings_and_holes_are_no_discs():
    disc = superellipse(64, 0.5, 0.5, 0.2, 0.2)
    for inner in (0.05, 0.1, 0.17):
        assert refused(paint(canvas(), disc - superellipse(64, 0.5, 0.5, inner, inner), "red"))
    outlined = paint(paint(canvas(), superellipse(64, 0.5, 0.5, 0.25, 0.25), "blue"), disc, "red")
    assert refused(outlined)
    assert refused(paint(paint(canvas(), disc, "red"), superellipse(64, 0.5, 0.5, 0.06, 0.06), "yellow"))


def test_things_melted_together_are_not_counted_one_by_one():
    pair = Spec("counting", CIRCLE.things * 2)
    apart = draw([Placed(("red", "circle"), x, 0.5, 0.13) for x in (0.3, 0.7)])
    assert verify(apart, pair)[0] == 1
    for x in (0.40, 0.43):  # overlapping, and touching at one point
        fused = draw([Placed(("red", "circle"), x, 0.5, 0.13), Placed(("red", "circle"), 0.66, 0.5, 0.13)])
        assert refused(fused, pair, CIRCLE)
    bridge = apart.copy()
    bridge[31:33, 20:45] = colour_of("red")
    assert refused(bridge, pair, CIRCLE)


def test_two_colours_in_one_thing_are_two_things():
    image = draw([Placed(("red", "circle"), 0.5, 0.5, 0.2)])
    half = image.copy()
    half[:, 32:] = draw([Placed(("blue", "circle"), 0.5, 0.5, 0.2)])[:, 32:]
    assert refused(half, CIRCLE, Spec("single", (("blue", "circle"),)))


def test_a_thing_cut_by_the_border_is_judged_by_what_is_left():
    def cut(x):
        axis = (np.arange(64) + 0.5) / 64
        distance = np.hypot(axis[None, :] - x, axis[:, None] - 0.5) - 0.2
        return paint(canvas(), np.clip(0.5 - distance * 64, 0, 1), "red")

    assert verify(cut(0.19), CIRCLE)[0] == 1
    assert refused(cut(0.0))
    assert refused(cut(0.08))


def test_tiny_copies_are_too_small_to_read():
    assert refused(draw([Placed(("red", "circle"), 0.5, 0.5, 0.05)]))


def test_confetti_and_noise_earn_nothing():
    rng = np.random.default_rng(0)
    palette = np.array([LIGHT, *COLOURS.values()], dtype=np.float32)
    for image in (rng.random((64, 64, 3)), palette[rng.integers(len(palette), size=(64, 64))]):
        assert all(verify(image, Spec("single", (thing,)))[1] < 0.2 for thing in THINGS[::7])
