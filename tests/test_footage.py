"""Videos that are given as files."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.footage import read_video
from flowalign.media import save
from flowalign.prompts import Prompt, PromptSet

RAMP = torch.arange(9)[:, None, None, None] / 8
LEVELS = RAMP.expand(9, 3, 40, 64)
"""Nine grey frames, from black to white."""
KINDS = {"a.gif": 0.005, "a.webp": 0.005, "a.png": 0.005, "frames": 0.005, "a.mp4": 0.03, "a.webm": 0.03, "a.mov": 0.03}
"""Names of a video of each kind, and how far its pixels may be off."""


def written(folder: Path, name: str, video: Tensor = LEVELS) -> Path:
    """A video (F, 3, H, W) as a file, or as a folder if the name has no suffix."""
    target = folder / name
    frames = [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in video]
    if target.suffix in (".gif", ".mp4"):
        save(video, target)
    elif target.suffix in (".webm", ".mov"):
        save(video, folder / "film.mp4")
        converted(folder / "film.mp4", target)
    elif target.suffix:
        options: dict[str, Any] = {"lossless": True} if target.suffix == ".webp" else {}
        frames[0].save(target, save_all=True, append_images=frames[1:], duration=60, **options)
    else:
        target.mkdir()
        (target / "notes.txt").write_text("not a frame")
        for i, frame in enumerate(frames):
            frame.save(target / f"frame_{i + 5}.png")  # 10 comes after 9
    return target


def converted(source: Path, target: Path) -> None:
    import subprocess

    from imageio_ffmpeg import get_ffmpeg_exe

    subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", str(source), str(target)], check=True)


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_spread_evenly_from_the_first_to_the_last(tmp_path: Path, name: str):
    path = written(tmp_path, name)
    for frames, wanted in ((9, range(9)), (5, range(0, 9, 2)), (2, (0, 8)), (1, (4,))):
        video = read_video(path, frames, (16, 24))
        assert video.shape == (frames, 3, 16, 24)
        assert video.dtype == torch.float32
        off = (video - RAMP[list(wanted)]).abs().max()
        assert off <= KINDS[name], (frames, off)


def test_frames_are_scaled_to_cover_the_size_and_cut_around_the_middle(tmp_path: Path):
    stripes = torch.zeros(3, 3, 20, 80)
    stripes[:, 0, :, :30], stripes[:, 1, :, 30:50], stripes[:, 2, :, 50:] = 1, 1, 1
    video = read_video(written(tmp_path, "frames", stripes), 3, (40, 40))
    assert video.shape == (3, 3, 40, 40)
    assert (video[:, 1] > 0.9).all(dim=1)[:, 2:-2].all()  # what is left is the green third


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_a_frame_that_lasts_longer_counts_as_several(tmp_path: Path, name: str):
    path = written(tmp_path, name, LEVELS[[0, 2, 2, 2, 2, 2, 4, 6, 8]])
    with Image.open(path) as image:
        assert image.n_frames == 5  # type: ignore[attr-defined]
    video = read_video(path, 9, (16, 24))
    assert (video.mean((1, 2, 3)) * 8).round().tolist() == [0, 2, 2, 2, 2, 2, 4, 6, 8]


@pytest.mark.parametrize("name", KINDS)
def test_too_few_frames_are_refused_by_name(tmp_path: Path, name: str):
    written(tmp_path, name)
    with pytest.raises(ValueError, match=rf"{name} has 9 frame\(s\), fewer than the 10 of resolution.train.frames"):
        read_video(tmp_path / name, 10, (16, 16))


def test_a_still_picture_is_a_video_of_one_frame(tmp_path: Path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    assert read_video(tmp_path / "a.png", 1, (4, 4)).mean((0, 2, 3)).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"a.png has 1 frame\(s\)"):
        read_video(tmp_path / "a.png", 5, (4, 4))


@pytest.mark.parametrize("name", [name for name in KINDS if name != "frames"])
@pytest.mark.parametrize("kept", [0, 4, 60])
def test_what_is_torn_is_told_in_a_sentence(tmp_path: Path, name: str, kept: int):
    path = written(tmp_path, name)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"the video .*{name} cannot be read"):
        read_video(path, 5, (16, 16))


def test_a_torn_frame_of_a_folder_is_told_too(tmp_path: Path):
    folder = written(tmp_path, "frames")
    (folder / "frame_9.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"the video .*frames cannot be read"):
        read_video(folder, 9, (16, 16))


def test_other_kinds_and_absent_files_are_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a.txt is not a video: it must end in .gif, .*, or be a folder of frames"):
        read_video(tmp_path / "a.txt", 5, (16, 16))
    with pytest.raises(ValueError, match=r"there is no video .*b.gif"):
        read_video(tmp_path / "b.gif", 5, (16, 16))


def test_without_the_extra_films_are_refused_with_its_name_and_animations_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    animation, film = written(tmp_path, "a.gif"), written(tmp_path, "a.mp4")
    imported: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "imageio_ffmpeg":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert read_video(animation, 5, (16, 16)).shape == (5, 3, 16, 16)
    with pytest.raises(ValueError, match=r"a .mp4 needs the video extra \(pip install 'flowalign\[video\]'\)"):
        read_video(film, 5, (16, 16))


# ------------------------------------------------------------ in prompt files


def prompts(folder: Path, *lines: dict[str, Any]) -> PromptSet:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "x", **line}) for line in lines))
    return PromptSet.read(str(path))


def test_videos_lie_beside_the_prompts_and_the_number_says_which(tmp_path: Path):
    for name, level in (("a", 0.0), ("b", 1.0)):
        written(tmp_path, name, torch.full((3, 3, 8, 8), level))
    both = prompts(tmp_path, {"video": "a"}, {"videos": ["a", "b"]})
    both.require_images(video=True)
    videos = both.images([0, 1, 1, 0], [1, 1, 2, 2], 4, 6, frames=3)
    assert videos.shape == (4, 3, 3, 4, 6)
    assert videos[:, 0, 0, 0, 0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(("line", "video", "sentence"), [
    ({}, True, r"prompts.jsonl:2: no video to learn from: give every line a `video` \(a file or a folder of frames"),
    ({"image": "a.png"}, True, r"prompts.jsonl:2: no video .* beside the prompt file, not an `image`\)"),
    ({"video": "a.gif"}, False, r"prompts.jsonl:2: no image .*a path beside the prompt file, not a `video`\)"),
    ({"video": 3}, True, "prompts.jsonl:2: no video"),
    ({"videos": []}, True, "prompts.jsonl:2: no video"),
    ({"video": "b.gif"}, True, "prompts.jsonl:2: there is no video .*b.gif"),
    ({"video": "prompts.jsonl"}, True, "prompts.jsonl:2: .*prompts.jsonl is not a video: it must end in"),
])  # fmt: skip
def test_a_line_of_the_other_kind_is_refused_at_once(tmp_path: Path, line: Any, video: bool, sentence: str):
    written(tmp_path, "a.gif")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    given = prompts(tmp_path, {"image": "a.png", "video": "a.gif"}, line)
    with pytest.raises(ValueError, match=sentence):
        given.require_images(video)


def test_painted_pictures_are_no_videos():
    painted = PromptSet([Prompt("x", source="here:1")], images=lambda *asked: pytest.fail("was asked"))
    with pytest.raises(ValueError, match="here:1: no video to learn from"):
        painted.require_images(video=True)


def test_a_short_video_is_told_with_its_line(tmp_path: Path):
    written(tmp_path, "a.gif")
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: the video .*a.gif has 9 frame\(s\), fewer than the 17"):
        prompts(tmp_path, {"video": "a.gif"}).images([0], [0], 8, 8, frames=17)
