"""Pictures and videos as files that others open."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.media import check_suffix, save

RAMP = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 17, 20)  # an odd side, which H.264 cannot have


def test_a_picture_keeps_its_pixels(tmp_path: Path):
    picture = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0))
    save(picture, tmp_path / "deep" / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "a.png"))
    assert np.abs(pixels / 255 - picture.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_a_gif_has_the_frames_and_their_time(tmp_path: Path):
    save(RAMP, tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size == (20, 17)
        assert gif.info["duration"] == 100
        brightness = []
        for i in range(5):
            gif.seek(i)
            brightness.append(np.asarray(gif.convert("L")).mean())
    assert np.abs(np.array(brightness) / 255 - np.linspace(0, 1, 5)).max() < 0.02


def test_an_mp4_plays(tmp_path: Path):
    save(RAMP, tmp_path / "a.mp4", fps=5)
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))
    assert frames == 5
    assert seconds == pytest.approx(1.0, abs=0.05)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    width, height = next(reader)["size"]
    assert (width, height) == (20, 18)
    brightness = [np.frombuffer(frame, np.uint8).mean() / 255 for frame in reader]
    assert np.abs(np.array(brightness) - np.linspace(0, 1, 5)).max() < 0.05


@pytest.mark.parametrize(("name", "video", "sentence"), [
    ("a.mp4", False, "a.mp4 cannot hold a picture: its name must end in .png"),
    ("a.png", True, "a.png cannot hold a video: its name must end in .gif, .mp4"),
    ("a", False, "its name must end in"),
])  # fmt: skip
def test_a_name_that_does_not_fit_is_refused(name: str, video: bool, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        check_suffix(Path(name), video)
