"""The spread of the pictures of a prompt, whoever has made them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowalign import diversity as module
from flowalign.diversity import diversity
from flowalign.geometry import Batch, Geometry


def alone(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("group_size", [2, 1000])
def test_it_is_the_spread_within_groups_whatever_their_size(group_size: int):
    apart = 100.0 * torch.arange(4000 // group_size).repeat_interleave(group_size).view(-1, 1, 1)
    x0 = 0.5 * torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0)) + apart
    assert diversity(x0, group_size, alone) == pytest.approx(0.5, rel=0.02)


def test_copies_have_none():
    assert diversity(torch.rand(1, 2, 3).expand(4, -1, -1), 4, alone) == 0


def test_it_is_the_same_for_any_number_of_ranks_and_dims_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Also where every rank has one member of a group."""
    x0 = torch.randn(8, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = diversity(x0, 4, alone)
    monkeypatch.setattr(module, "AT_ONCE", 8)
    for ranks in (1, 2, 4):
        geometry = Geometry(Batch(prompts=2, group_size=4, micro=1), 1, ranks)
        dealt = [x0[geometry.local_samples(rank)] for rank in range(ranks)]
        taken = 0

        def gather(part: Tensor, geometry: Geometry = geometry, dealt: list[Tensor] = dealt) -> Tensor:
            nonlocal taken
            columns = slice(taken, taken + part.shape[1])
            taken += part.shape[1]
            return geometry.in_order(torch.stack([x.flatten(1)[:, columns] for x in dealt]))

        assert diversity(dealt[0], 4, gather) == pytest.approx(expected, rel=1e-12)
