import pytest
import torch

from flowalign.types import Conditioning, Point, required


def prompts(batch: int, length: int) -> Conditioning:
    return Conditioning(
        {
            "embeds": torch.ones(batch, length, 2),
            "mask": torch.ones(batch, length, dtype=torch.bool),
            "pooled": torch.arange(float(batch * 3)).view(batch, 3),
            "neg.scale": torch.arange(batch),
        }
    )


def test_cat_pads_ragged_dims_on_the_right_with_zeros():
    joined = Conditioning.cat([prompts(1, 2), prompts(2, 4)])
    assert {len(t) for t in joined.values()} == {3}
    assert joined["mask"].tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert joined["embeds"].shape == (3, 4, 2)
    assert joined["embeds"][0, :, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert joined["pooled"].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]


def test_cat_refuses_different_entries():
    other = prompts(1, 2)
    del other["pooled"]
    with pytest.raises(ValueError, match="pooled"):
        Conditioning.cat([prompts(1, 2), other])


def test_index_undoes_cat():
    a, b = prompts(2, 3), prompts(1, 3)
    part = Conditioning.cat([a, b]).index(torch.tensor([0, 1]))
    assert all(torch.equal(part[key], a[key]) for key in a)


def test_repeat_interleave_keeps_a_group_together():
    assert prompts(2, 1).repeat_interleave(3)["neg.scale"].tolist() == [0, 0, 0, 1, 1, 1]


def test_to_a_lower_precision_leaves_masks_and_integers_alone():
    c = prompts(1, 2).to(dtype=torch.bfloat16)
    assert (c["embeds"].dtype, c["mask"].dtype, c["neg.scale"].dtype) == (torch.bfloat16, torch.bool, torch.int64)


def test_a_point_is_indexed_in_every_field_and_every_frozen_velocity():
    x = torch.arange(6.0).view(3, 2)
    p = Point(x=x, sigma=x[:, 0], advantage=x[:, 1], mean=x + 10, frozen={"old": x + 20})
    q = p.index(torch.tensor([2, 0]))
    assert q.x.tolist() == [[4, 5], [0, 1]]
    assert (q.sigma.tolist(), q.advantage.tolist()) == ([4, 0], [5, 1])
    assert required(q.mean, "mean").tolist() == [[14, 15], [10, 11]]
    assert q.frozen["old"].tolist() == [[24, 25], [20, 21]]
    assert q.x_next is None
    assert p.x.shape == (3, 2)


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="`x_next`"):
        required(None, "x_next")
