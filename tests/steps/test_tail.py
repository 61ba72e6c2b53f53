import torch

from flowalign.flow import shifted
from flowalign.steps.tail import shorten

BASE = shifted(torch.linspace(1, 0, 26), 3.0)
"""MixGRPO's own schedule: 25 steps, shift 3."""


def test_mixgrpo_flash_keeps_four_tenths_of_the_points():
    """Window [0, 4): M = int((25 - 3) 0.4) = 8 points from an unshifted 1 - 4/25 to 0, hence 4 + 7 steps."""
    short = shorten(BASE, last=3, share=0.4, shift=3.0)
    expected = torch.cat([BASE[:4], shifted(torch.linspace(1 - 4 / 25, 0, 8), 3.0)])
    assert len(short) == 12
    assert torch.allclose(short, expected, atol=1e-6)


def test_the_steps_up_to_the_window_are_untouched_and_the_end_is_clean():
    for last in range(24):
        short = shorten(BASE, last, 0.2, 3.0)
        assert torch.equal(short[: last + 2], BASE[: last + 2])
        assert short[-1] == 0
        assert (short.diff() < 0).all()


def test_a_late_window_still_has_a_step_to_the_picture():
    """The method's code has int((25 - 22) 0.2) = 1 point here, and decodes what is still noisy."""
    assert torch.equal(shorten(BASE, 22, 0.2, 3.0), torch.cat([BASE[:24], torch.zeros(1)]))


def test_without_steps_to_leave_out_nothing_changes():
    assert torch.equal(shorten(BASE, 24, 0.4, 3.0), BASE)
    assert torch.equal(shorten(BASE, -1, 0.4, 3.0), BASE)
    assert torch.allclose(shorten(BASE, 10, 1.0, 3.0), BASE, atol=1e-6)
