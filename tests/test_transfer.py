"""Copies that need not wait; what a CUDA device makes of them, only one can show."""

from __future__ import annotations

import torch

from flowalign.transfer import empty_for, swap, to_device


def test_what_is_sent_to_where_it_is_stays_itself():
    t = empty_for((2, 3), "cpu")
    assert t.shape == (2, 3)
    assert t.dtype == torch.float32
    assert not t.is_pinned()
    assert to_device(t, "cpu") is t
    assert to_device(t, torch.device("cpu")) is t
    assert to_device(t, "meta").device.type == "meta"


def test_exchanged_values_are_swapped_in_place_and_back_to_the_bit():
    these, those = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)]
    before, views = [[t.clone() for t in ts] for ts in (these, those)], [t.view(-1) for t in these]
    swap(these, those)
    assert all(map(torch.equal, these, before[1]))
    assert all(map(torch.equal, those, before[0]))
    assert all(view.data_ptr() == t.data_ptr() for view, t in zip(views, these, strict=True))
    swap(these, those)
    assert all(map(torch.equal, these, before[0]))
    assert all(map(torch.equal, those, before[1]))
