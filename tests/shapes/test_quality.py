from dataclasses import replace

import numpy as np
import pytest
from drawing import blurred, canvas, draw, paint, specks, superellipse

from flowalign.shapes.quality import _fit, fit, quality
from flowalign.shapes.render import picture, place
from flowalign.shapes.world import KINDS, Spec, specs

NUMBER = 24


def scenes(kind: str, shape: str | None = None) -> list[Spec]:
    pool = [s for s in specs(kind) if shape is None or all(t[1] == shape for t in s.things)]
    return [pool[i * 7919 % len(pool)] for i in range(NUMBER)]


def placed(spec: Spec, seed: int):
    return place(spec, np.random.default_rng(seed))


def noisy(spec: Spec, seed: int) -> np.ndarray:
    return np.clip(picture(spec, seed) + np.random.default_rng(seed).normal(0, 0.05, (64, 64, 3)), 0, 1)


def squared(spec: Spec, seed: int, exponent: float) -> np.ndarray:
    image = canvas()
    for p in placed(spec, seed):
        image = paint(image, superellipse(64, p.x, p.y, p.radius, p.radius, exponent), p.thing[0])
    return image


CORRUPTIONS = {
    "noise": noisy,
    "blur": lambda spec, seed: blurred(picture(spec, seed)),
    "speckles": lambda spec, seed: specks(draw(placed(spec, seed)), 6, 2, "blue", seed),
    "coloured background": lambda spec, seed: picture(spec, seed) * np.array([1, 0.85, 0.85]),
    "larger things": lambda spec, seed: draw([replace(p, radius=1.5 * p.radius) for p in placed(spec, seed)]),
}


def scores(kind: str, of, shape: str | None = None) -> np.ndarray:
    return np.array([quality(of(spec, 10**6 + i), kind) for i, spec in enumerate(scenes(kind, shape))])


@pytest.fixture(scope="module")
def real() -> dict[str, np.ndarray]:
    return {kind: scores(kind, picture) for kind in ("single", "two", "counting")}


@pytest.mark.parametrize("kind", ["single", "two", "counting"])
def test_real_renders_score_about_nine_tenths(real, kind):
    assert 0.85 < real[kind].mean() < 0.98
    assert (real[kind] < 0.5).mean() < 0.05


@pytest.mark.parametrize("kind", ["single", "two", "counting"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corrupted_renders_score_clearly_lower(real, kind, name):
    corrupted = scores(kind, CORRUPTIONS[name])
    assert ((corrupted >= 0) & (corrupted <= 1)).all()
    assert corrupted.mean() < real[kind].mean() - 0.1


@pytest.mark.parametrize("exponent", [3.0, 4.0])
def test_circles_on_their_way_to_squares_score_clearly_lower(exponent):
    def drawn(n):
        return scores("counting", lambda spec, seed: squared(spec, seed, n), "circle").mean()

    assert drawn(exponent) < drawn(2.0) - 0.2


def test_nothing_and_noise_are_worth_nothing():
    images = [canvas(), np.zeros((64, 64, 3)), np.random.default_rng(0).random((64, 64, 3))]
    assert all(quality(image, "two") < 0.2 for image in images)


def test_the_score_is_deterministic():
    image = picture(specs("two")[7], 3)
    assert quality(image, "two") == quality(image.copy(), "two")


def test_an_unknown_kind_is_named_in_the_error():
    with pytest.raises(ValueError, match=r"'color_attr'.*single, two, counting, position"):
        quality(canvas(), "color_attr")


def test_nothing_is_shared_with_the_verifier():
    import ast
    from pathlib import Path

    import flowalign.shapes.quality as module

    tree = ast.parse(Path(module.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "flowalign.shapes.verify" not in modules
    assert not names & {"COLOURS", "coverage", "verify"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_renders_is_what_they_are(kind: str):
    for kept, fresh in zip(_fit(kind, 64), fit(kind, 64), strict=True):
        np.testing.assert_allclose(kept, fresh, rtol=1e-9, atol=1e-12)
