import numpy as np
import pytest

from flowalign.shapes.render import painted, picture, place
from flowalign.shapes.world import KINDS, specs

SCENES = [(specs(kind)[i * 331 % len(specs(kind))], 50 * k + i) for k, kind in enumerate(KINDS) for i in range(40)]


def test_pictures_are_float32_within_zero_and_one():
    for spec, seed in SCENES:
        image = picture(spec, seed)
        assert image.dtype == np.float32
        assert image.shape == (64, 64, 3)
        assert image.min() >= 0
        assert image.max() <= 1


def test_a_seed_is_one_scene_at_every_size():
    for spec, seed in SCENES:
        large = picture(spec, seed, 128)
        halved = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        difference = abs(halved - picture(spec, seed, 64))
        assert difference.mean() < 0.004
        assert np.quantile(difference, 0.99) < 0.1


def test_the_same_seed_gives_the_same_picture_and_another_seed_another():
    for spec, seed in SCENES[::10]:
        assert np.array_equal(picture(spec, seed), picture(spec, seed))
        assert not np.array_equal(picture(spec, seed), picture(spec, seed + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_things_lie_inside_apart_and_in_their_relation(kind):
    pool = specs(kind)
    for i in range(200):
        spec = pool[i * 7919 % len(pool)]
        placed = place(spec, np.random.default_rng(i))
        assert tuple(p.thing for p in placed) == spec.things
        for p in placed:
            assert p.radius <= min(p.x, p.y, 1 - p.x, 1 - p.y)
        for j, a in enumerate(placed):
            for b in placed[:j]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius
        if spec.relation:
            first, second = placed
            gap = {
                "left of": second.x - first.x,
                "right of": first.x - second.x,
                "above": second.y - first.y,
                "below": first.y - second.y,
            }
            assert gap[spec.relation] > 0.3
            assert sum(g > 0.5 * gap[spec.relation] for g in gap.values()) == 1  # no second relation to argue about


def test_a_prompt_is_painted_from_its_metadata():
    for spec, seed in SCENES[::10]:
        assert np.array_equal(painted(spec.metadata(), seed, 32, 32), picture(spec, seed, 32))
    with pytest.raises(ValueError, match="draws squares"):
        painted(SCENES[0][0].metadata(), 0, 32, 64)
