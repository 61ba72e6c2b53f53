"""The batch plan: what follows from four numbers, and the nearest plan where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from flowalign.geometry import Batch, Geometry, PlanError, nearest_divisor

CASES = [
    # prompts, group, micro, updates, passes, points, ranks → accumulate, steps and batches an epoch, local samples
    ((16, 12, 96, 2, 1, 9, 1), (9, 2, 18, 192)),
    ((2, 2, 3, 2, 1, 3, 1), (2, 2, 4, 4)),
    ((4, 8, 16, 1, 3, 2, 2), (2, 3, 6, 16)),
    ((48, 24, 9, 2, 1, 9, 8), (72, 2, 144, 144)),
    ((3, 4, 2, 3, 2, 1, 2), (1, 6, 6, 6)),
]


@pytest.mark.parametrize(("given", "expected"), CASES)
def test_the_plan_follows_from_the_numbers(given: tuple[int, ...], expected: tuple[int, ...]):
    prompts, group, micro, updates, passes, points, ranks = given
    g = Geometry(Batch(prompts, group, micro, updates, passes), points, ranks)
    assert (g.accumulate, g.steps_per_epoch, g.batches_per_epoch, g.samples_local) == expected
    assert g.batches_per_epoch * micro * ranks == g.samples * points * passes  # every point, once a pass


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_samples_are_dealt_round_robin(ranks: int):
    g = Geometry(Batch(prompts=3, group_size=4, micro=1), 1, ranks)
    hands = [list(g.local_samples(rank)) for rank in range(ranks)]
    assert sorted(sample for hand in hands for sample in hand) == list(range(12))
    assert len({len(hand) for hand in hands}) == 1
    assert [hand[0] for hand in hands] == list(range(ranks))


@pytest.mark.parametrize(
    ("batch", "points", "ranks", "sentence"),
    [
        (Batch(3, 5, 1), 1, 2, r"3 prompts × 5 = 15 samples cannot be dealt to 2 ranks: use batch.prompts=4\.$"),
        (
            Batch(4, 5, 1, updates=3),
            1,
            1,
            r"20 samples .* batch.updates=3 equal parts: use batch.updates=4\.$",
        ),
        (
            Batch(16, 12, 100, updates=2),
            9,
            1,
            r"864 training points .* batch.micro=100: use batch.micro=96\.$",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_with_the_nearest(batch: Batch, points: int, ranks: int, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        Geometry(batch, points, ranks)


@pytest.mark.parametrize(
    ("number", "wanted", "nearest"), [(20, 3, 4), (864, 100, 96), (7, 5, 7), (12, 5, 6), (12, 1, 1)]
)
def test_the_nearest_divisor_is_the_larger_of_two(number: int, wanted: int, nearest: int):
    assert nearest_divisor(number, wanted) == nearest


@pytest.mark.parametrize("name", ["prompts", "micro", "updates", "passes"])
def test_nothing_at_all_is_refused(name: str):
    numbers = {"prompts": 2, "group_size": 2, "micro": 2, "updates": 1, "passes": 1}
    with pytest.raises(ValueError, match=rf"batch\.{name} must be at least 1 \(got 0\)"):
        Batch(**(numbers | {name: 0}))


def test_a_group_of_one_is_refused_because_it_teaches_nothing():
    with pytest.raises(ValueError, match="group_size=1 gives every advantage 0"):
        Batch(prompts=4, group_size=1, micro=1)


def test_the_table_says_the_plan_in_words():
    table = Geometry(Batch(16, 12, 96, 2), 9, 1).table()
    assert table["samples per epoch"] == "16 prompts × 12 = 192"
    assert table["one optimiser step"] == "9 micro-batches × 96 points"


# ------------------------------------------------------------ rows that belong together


def test_whole_groups_are_dealt_round_robin_and_gathered_in_order():
    g = Geometry(Batch(prompts=4, group_size=3, micro=1), 1, 2, whole=True)
    hands = [g.local_samples(rank) for rank in range(2)]
    assert hands == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert g.in_order(torch.tensor(hands)).tolist() == list(range(12))


@pytest.mark.parametrize("whole", [False, True])
def test_what_ranks_gather_is_by_sample_whatever_its_shape(whole: bool):
    g = Geometry(Batch(prompts=2, group_size=3, micro=1), 1, 2, whole=whole)
    hands = torch.tensor([g.local_samples(rank) for rank in range(2)])
    assert g.in_order(torch.stack([hands, 10 * hands], dim=-1)).tolist() == [[s, 10 * s] for s in range(6)]


def test_groups_that_cannot_be_dealt_whole_are_refused_with_the_nearest_number():
    Geometry(Batch(prompts=3, group_size=4, micro=1), 1, 2)
    for arguments in ({"whole": True}, {"together": "group"}, {"members": 2}):
        with pytest.raises(ValueError, match=r"3 prompts × 4 .* 2 ranks in whole groups: use batch.prompts=4"):
            Geometry(Batch(prompts=3, group_size=4, micro=4), 1, 2, **arguments)


def test_training_on_a_few_members_makes_fewer_points():
    g = Geometry(Batch(prompts=4, group_size=6, micro=4, updates=2), 3, together="group", members=2)
    assert (g.samples_local, g.trained_local, g.units_local, g.points_per_update, g.accumulate) == (24, 8, 4, 12, 3)
    with pytest.raises(ValueError, match=r"7 members .* more than batch.group_size=6: use batch.group_size=7\.$"):
        Geometry(Batch(prompts=4, group_size=6, micro=4), 1, members=7)


def test_extremes_are_at_least_a_pair_and_at_most_the_group():
    members = [Batch(prompts=4, group_size=6, micro=4, extremes=n).members for n in (None, 2, 5, 6, 7)]
    assert members == [None, 2, 5, None, None]
    with pytest.raises(ValueError, match=r"batch.extremes=1 leaves no pair .* use at least 2, or null"):
        Batch(prompts=4, group_size=6, micro=4, extremes=1)


@pytest.mark.parametrize(
    ("together", "micro", "nearest"), [("group", 9, "12"), ("group", 4, "6"), ("sample", 8, "9"), ("sample", 4, "3")]
)
def test_a_micro_batch_holds_whole_groups_or_samples(together: Literal["group", "sample"], micro: int, nearest: str):
    """36 points an update: 2 groups of 6 pictures with 3 points each."""
    Geometry(Batch(prompts=4, group_size=6, micro=18, updates=2), 3, together=together)
    with pytest.raises(ValueError, match=rf"batch.micro={micro} of whole {together}s .* use batch.micro={nearest}\.$"):
        Geometry(Batch(prompts=4, group_size=6, micro=micro, updates=2), 3, together=together)


@pytest.mark.parametrize("together", ["point", "sample", "group"])
def test_a_micro_batch_for_one_rank_fits_several(together: Literal["point", "sample", "group"]):
    """An update with fewer points is one micro-batch; one with more is cut evenly or refused."""
    batch = Batch(prompts=12, group_size=6, micro=72, updates=2)
    plans = [Geometry(batch, 2, ranks, together) for ranks in (1, 2, 3, 6)]
    assert [(g.micro, g.accumulate) for g in plans] == [(72, 1), (36, 1), (24, 1), (12, 1)]
    with pytest.raises(ValueError, match=r"72 training points .* batch.micro=48.*: use batch.micro=36\.$"):
        Geometry(replace(batch, micro=48), 2, 1, together)


def test_groups_that_belong_together_are_dealt_whole_to_the_updates():
    with pytest.raises(ValueError, match=r"4 groups on a rank .* batch.updates=3 .* use batch.updates=4\.$"):
        Geometry(Batch(prompts=4, group_size=6, micro=6, updates=3), 1, together="group")


@pytest.mark.parametrize(
    ("batch", "ranks", "change"),
    [
        (Batch(prompts=2, group_size=2, micro=1), 1, r"batch.micro=1 leaves .* use batch.micro=2\.$"),
        (Batch(prompts=2, group_size=3, micro=1, updates=2), 1, r"batch.micro=1 leaves .* use batch.micro=3\.$"),
        (Batch(prompts=1, group_size=2, micro=1, updates=2), 1, "use batch.updates=1 and batch.micro=2 together"),
        (Batch(prompts=1, group_size=2, micro=1), 2, "use batch.prompts=2 and batch.micro=2 together"),
    ],
)
def test_points_that_are_compared_are_not_alone(batch: Batch, ranks: int, change: str):
    Geometry(batch, 1, ranks)
    with pytest.raises(ValueError, match=change) as refusal:
        Geometry(batch, 1, ranks, least=2)
    assert isinstance(refusal.value, PlanError)
    assert Geometry(replace(batch, **refusal.value.changes), 1, ranks, least=2).micro >= 2
