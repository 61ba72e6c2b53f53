"""Every batch plan: what is accepted is even on all ranks, and what is refused names one that is accepted."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pytest
import torch

from flowalign.buffer import IndexLoader
from flowalign.geometry import Batch, Geometry, PlanError

Arguments = dict[str, Any]
POINTS = (("point", None, False, 1), ("point", None, True, 1), ("point", None, True, 4), ("sample", None, False, 1))
KINDS = (*POINTS, ("group", None, False, 1), ("group", 2, False, 1))
"""together, members, whole, trunk."""
GEOMETRIES = [
    (Batch(prompts, group_size, micro, updates, passes=1 + prompts % 2), points, ranks, *kind)
    for prompts, group_size, micro, (updates, points), ranks, kind in product(
        (2, 3, 8), (2, 4, 6), (3, 4), ((1, 3), (2, 1), (3, 4)), (1, 2, 3), KINDS
    )
]


def planned(batch: Batch, points: int, ranks: int, together: Any, members: int | None, whole: bool, trunk: int):
    return Geometry(batch, points, ranks, together, members, whole, trunk)


def check_even(g: Geometry) -> None:
    """What ranks wait for each other for: equally many batches of one size, and every point once a pass."""
    every = list(range(g.trained_local * g.points_per_sample))
    for rank in range(g.world_size):
        batches = list(IndexLoader(g, seed=0, rank=rank))
        assert len(batches) == len(IndexLoader(g, 0, rank)) == g.accumulate * g.steps_per_epoch
        assert {len(batch) for batch in batches} == {g.micro}
        a_pass = g.accumulate * g.batch.updates
        for start in range(0, len(batches), a_pass):
            assert torch.cat(batches[start : start + a_pass]).sort().values.tolist() == every
    hands = [g.local_samples(rank) for rank in range(g.world_size)]
    assert {len(hand) for hand in hands} == {g.samples_local}
    assert sorted(sample for hand in hands for sample in hand) == list(range(g.samples))


def named(sentence: str) -> dict[str, int]:
    """The values that a refusal recommends."""
    advice = sentence.rpartition(": use ")[2]
    return {name: int(value) for name, value in re.findall(r"batch\.(\w+)=(\d+)", advice)}


def refused(*given: Any) -> PlanError | None:
    try:
        planned(*given)
    except PlanError as refusal:
        return refusal
    return None


def judged(given: tuple[Any, ...]) -> tuple[bool, int]:
    """Whether a geometry is accepted as it is, and how many values a refusal named."""
    batch, *rest = given
    if (refusal := refused(batch, *rest)) is None:
        check_even(planned(batch, *rest))
        return True, 0
    sentence, changes = str(refusal), named(str(refusal))
    assert changes == refusal.changes
    assert changes.items().isdisjoint(asdict(batch).items())  # nothing that was so already
    assert ("together" in sentence.rpartition(": use ")[2]) == (len(changes) > 1)
    check_even(planned(replace(batch, **changes), *rest))
    return False, len(changes)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_plan_is_even_or_names_one_that_is(kind: tuple[Any, ...]):
    results = [judged(given) for given in GEOMETRIES if given[3:] == kind]
    accepted = sum(fits for fits, _ in results)
    assert len(results) == 162
    assert 5 < accepted < 157  # both happen
    assert max(changes for _, changes in results) > 1


def test_one_value_is_named_where_one_is_enough():
    with pytest.raises(PlanError, match=r"batch.micro=7: use batch.micro=8\.$"):
        Geometry(Batch(prompts=4, group_size=4, micro=7), 1)


@pytest.mark.parametrize("kind", ["updates", "prompts"])
def test_the_nearest_plan_is_no_further_than_any_other(kind: str):
    """Of the value that is at fault, by trying all of them."""
    rest = (1, 4, "point", None, False, 1)
    for wanted in range(1, 40):
        batch = replace(Batch(prompts=6, group_size=6, micro=1), **{kind: wanted})
        refusal = refused(batch, *rest)
        if refusal is None or kind not in refusal.changes:
            continue
        others = [n for n in range(1, 80) if not refused(replace(batch, **(refusal.changes | {kind: n})), *rest)]
        assert abs(refusal.changes[kind] - wanted) == min(abs(n - wanted) for n in others)


def test_a_group_is_a_whole_number_of_trunks():
    Geometry(Batch(2, 108, 4), 1, trunk=54, whole=True)
    with pytest.raises(PlanError, match=r"group_size=60 .* trunks of 54 branches: use batch.group_size=54 and"):
        Geometry(Batch(2, 60, 8), 1, trunk=54, whole=True)
