"""Motion and smoothness of videos, and rewards of a few of their frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.rewards.base import RewardError
from flowalign.rewards.frames import Frames, evenly_spaced
from flowalign.rewards.groupwise import WinRate
from flowalign.rewards.jpeg import Jpeg
from flowalign.rewards.motion import Motion, Smoothness

GENERATOR = torch.Generator().manual_seed(0)
WALL = torch.nn.functional.interpolate(
    torch.rand(1, 3, 40, 60, generator=GENERATOR), scale_factor=4, mode="bicubic"
).clamp(0, 1)[0]


def panned(step: int, frames: int = 5) -> Tensor:
    """A camera that passes a wall by so many pixels a frame, (1, F, 3, 128, 160)."""
    return torch.stack([WALL[:, 16:144, 20 + step * i : 180 + step * i] for i in range(frames)])[None]


def score(reward: Any, media: Tensor) -> Tensor:
    return reward(media, [""] * len(media), [{}] * len(media))


@pytest.mark.parametrize("step", [0, 2, 4])
def test_motion_is_the_pixels_a_frame_in_percent_of_the_diagonal(step: int):
    diagonal = (128**2 + 160**2) ** 0.5
    assert score(Motion(), panned(step)).item() == pytest.approx(100 * step / diagonal, rel=0.1, abs=0.02)


def test_motion_does_not_depend_on_the_resolution():
    large = torch.nn.functional.interpolate(panned(3)[0], scale_factor=3, mode="bilinear")[None]
    assert score(Motion(), large).item() == pytest.approx(score(Motion(), panned(3)).item(), rel=0.1)


def test_the_pixels_that_move_most_see_a_small_thing():
    video = panned(0).clone()
    for i in range(5):
        video[0, i, :, 40:60, 40 + 4 * i : 60 + 4 * i] = WALL[:, :20, :20]
    assert score(Motion(top=0.05), video) > 4 * score(Motion(), video)


def test_even_changes_are_smooth_and_flicker_is_not():
    fade = torch.linspace(0, 1, 5).view(1, 5, 1, 1, 1).expand(1, 5, 3, 8, 8)
    flicker = torch.tensor([0.0, 1, 0, 1, 0]).view(1, 5, 1, 1, 1).expand(1, 5, 3, 8, 8)
    assert score(Smoothness(), torch.cat([fade, fade[:, :1].expand_as(fade)])).tolist() == pytest.approx([1, 1])
    assert score(Smoothness(), flicker).item() == 0
    assert score(Smoothness(), panned(0)) > score(Smoothness(), panned(2)) > score(Smoothness(), panned(9))


@pytest.mark.parametrize("reward", [Motion(), Smoothness()])
def test_videos_are_judged_one_by_one_and_what_is_not_finite_not_at_all(reward: Any):
    videos = torch.cat([panned(2), panned(4), panned(2)])
    videos[2, 3, 0, 0, 0] = torch.nan
    scores = score(reward, videos)
    assert scores[:2].equal(torch.cat([score(reward, panned(2)), score(reward, panned(4))]))
    assert scores[2].isnan()


def test_what_cannot_move_is_refused():
    with pytest.raises(ValueError, match="videos of at least 2 frames"):
        score(Motion(), torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match="videos of at least 3 frames"):
        score(Smoothness(), torch.rand(2, 2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        Motion(top=0)


def test_self_check_of_motion(monkeypatch: pytest.MonkeyPatch):
    Motion().self_check()
    with monkeypatch.context() as changed:
        changed.setattr(Motion, "_mean_flow", lambda self, first, second: 1.0)
        with pytest.raises(RewardError, match="to a fast, a slow and a still square"):
            Motion().self_check()
    monkeypatch.setattr("flowalign.rewards.motion.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"pip install 'flowalign\[motion\]'"):
        Motion().self_check()


def test_frames_are_evenly_spaced_and_include_the_ends():
    assert [evenly_spaced(33, num) for num in (1, 2, 3, 5)] == [[16], [0, 32], [0, 16, 32], [0, 8, 16, 24, 32]]


def test_a_reward_of_some_frames_is_the_reward_of_the_video_of_these():
    video = torch.rand(2, 9, 3, 16, 16, generator=GENERATOR)
    assert score(Frames(Jpeg(), 3), video).equal(score(Jpeg(), video[:, [0, 4, 8]]))
    assert score(Frames(Jpeg(), 20), video).equal(score(Jpeg(), video))
    assert score(Frames(Jpeg(), 3), video[:, 0]).equal(score(Jpeg(), video[:, 0]))
    groups = torch.tensor([0, 0])
    won = Frames(WinRate(Jpeg()), 3)(video, [""] * 2, [{}] * 2, groups=groups)
    assert won.equal(WinRate(Jpeg())(video[:, [0, 4, 8]], [""] * 2, [{}] * 2, groups))
    assert Frames(WinRate(Jpeg()), 3).groupwise
    assert not Frames(Jpeg(), 3).groupwise
    with pytest.raises(ValueError, match="at least 1"):
        Frames(Jpeg(), 0)


def test_the_check_of_the_inner_reward_runs():
    class Broken(Motion):
        def self_check(self) -> None:
            raise RewardError("broken")

    with pytest.raises(RewardError, match="broken"):
        Frames(Broken(), 2).self_check()
    Frames(lambda media, prompts, metadata: torch.zeros(len(media)), 2).self_check()
