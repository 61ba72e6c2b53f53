import pytest
import torch

from flowalign.algorithms import Decay


@pytest.mark.parametrize(
    ("kind", "name"), [(0, "nft_type0"), (1, "nft_type1"), (2, "nft_type2"), ((0, 0.001, 0.3), "awm_linear_0p3")]
)
def test_the_reference_schedules_are_reproduced(golden, kind, name):
    d = golden("decay_schedules")
    ours = torch.tensor([Decay(kind)(k) for k in d["steps"].tolist()], dtype=torch.float64)
    torch.testing.assert_close(ours, d[name], rtol=0, atol=0)


def test_a_schedule_of_ones_own():
    decay = Decay((10, 0.1, 0.25))
    assert [decay(k) for k in (0, 10, 11, 12, 13, 1000)] == pytest.approx([0, 0, 0.1, 0.2, 0.25, 0.25])


def test_a_schedule_may_start_above_zero():
    # CRD's old policy: 0.25 + 0.005 k up to 0.999.
    decay = Decay((0, 0.005, 0.999), start=0.25)
    assert [decay(k) for k in (0, 1, 100, 1000)] == pytest.approx([0.25, 0.255, 0.75, 0.999])
    assert Decay((10, 0.1, 0.5), start=0.2)(9) == 0
    with pytest.raises(ValueError, match="start"):
        Decay((0, 0.1, 0.5), start=0.6)


@pytest.mark.parametrize("kind", [3, (1, 2), (0, -1, 0.5), (0, 0.1, 1.5)])
def test_an_impossible_schedule_is_refused(kind):
    with pytest.raises(ValueError, match="a decay"):
        Decay(kind)
