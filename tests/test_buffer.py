"""The points of an epoch and the order in which they are visited."""

from __future__ import annotations

import pytest
import torch

from flowalign.buffer import Buffer, IndexLoader
from flowalign.geometry import Batch, Geometry
from flowalign.types import Conditioning, Point

GEOMETRY = Geometry(Batch(prompts=4, group_size=6, micro=6, updates=3, passes=2), points_per_sample=3)


def order(epoch: int, seed: int = 0, rank: int = 0) -> list[torch.Tensor]:
    loader = IndexLoader(GEOMETRY, seed, rank)
    loader.set_epoch(epoch)
    return list(loader)


def test_every_pass_visits_every_point_once():
    batches = order(0)
    assert len(batches) == len(IndexLoader(GEOMETRY, 0, 0)) == GEOMETRY.batches_per_epoch
    assert {len(batch) for batch in batches} == {6}
    half = len(batches) // 2
    for turn in (batches[:half], batches[half:]):
        assert sorted(torch.cat(turn).tolist()) == list(range(24 * 3))


def test_the_points_of_a_sample_serve_one_update():
    batches = order(0)
    for start in range(0, len(batches), GEOMETRY.accumulate):
        update = torch.cat(batches[start : start + GEOMETRY.accumulate])
        samples, count = torch.unique(update // 3, return_counts=True)
        assert len(samples) == 24 // 3
        assert set(count.tolist()) == {3}


def test_a_micro_batch_spans_samples():
    assert all(len(torch.unique(batch // 3)) == 6 for batch in order(0))


def test_the_order_is_a_function_of_seed_epoch_and_rank():
    first = torch.cat(order(1))
    torch.manual_seed(99)
    assert torch.equal(first, torch.cat(order(1)))
    for other in (order(2), order(1, seed=1), order(1, rank=1)):
        assert not torch.equal(first, torch.cat(other))


def test_the_loader_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    order(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_epoch_counts_from_the_first_batch_on():
    """Lightning makes the iterator before it says which epoch it is."""
    loader = IndexLoader(GEOMETRY, 0, 0)
    iterator = iter(loader)
    loader.set_epoch(5)
    assert torch.equal(next(iterator), order(5)[0])


def test_a_group_is_never_torn_and_meets_itself_at_the_same_point():
    """Two members of each of 6 groups at 3 points: the loss couples the members at one point."""
    g = Geometry(Batch(prompts=6, group_size=4, micro=4, updates=3), 3, together="group", members=2)
    batches = list(IndexLoader(g, 0, 0))
    assert sorted(torch.cat(batches).tolist()) == list(range(6 * 2 * 3))
    for batch in batches:
        samples, point = batch // 3, batch % 3
        groups, count = torch.unique(torch.stack([samples // 2, point]), dim=1, return_counts=True)
        assert set(count.tolist()) == {2}
        assert groups.shape[1] == 2


def test_the_points_of_a_sample_stay_together_where_the_loss_wants_them():
    g = Geometry(Batch(prompts=4, group_size=6, micro=6, updates=2), 3, together="sample")
    batches = list(IndexLoader(g, 0, 0))
    assert sorted(torch.cat(batches).tolist()) == list(range(24 * 3))
    for batch in batches:
        assert set(torch.unique(batch // 3, return_counts=True)[1].tolist()) == {3}


@pytest.fixture
def buffer() -> Buffer:
    points = Point(
        x=torch.arange(8.0)[:, None],
        sigma=torch.linspace(0.1, 0.8, 8),
        advantage=torch.zeros(8),
        frozen={"old": torch.arange(8.0)},
    )
    filled = Buffer()
    filled.fill(3, points, Conditioning({"tokens": torch.tensor([[10.0], [20.0]])}), torch.arange(8) // 4)
    return filled


def test_points_come_with_the_conditioning_of_their_prompt(buffer: Buffer):
    point, cond = buffer.gather(torch.tensor([7, 0, 3]))
    assert point.x.flatten().tolist() == [7, 0, 3]
    assert point.frozen["old"].tolist() == [7, 0, 3]
    assert cond["tokens"].flatten().tolist() == [20, 10, 10]
    assert buffer.epoch == 3


def test_points_without_a_prompt_are_refused(buffer: Buffer):
    with pytest.raises(ValueError, match="8 points need as many prompt rows"):
        buffer.fill(0, buffer.points, buffer.cond, torch.zeros(7, dtype=torch.long))
