"""Reading of given videos: an animation, a video file or a folder of frames, sampled to a model's number of frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import median_low
from typing import Any, Protocol

from PIL import Image, ImageSequence
from torch import Tensor, stack

from flowalign.ffmpeg import ffmpeg
from flowalign.pixels import tensor_of
from flowalign.rewards.frames import evenly_spaced

ANIMATIONS, FILMS = (".gif", ".webp", ".png", ".apng"), (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of frames in a folder; other files are ignored."""


class Footage(Protocol):
    """Frames in temporal order. For damaged files, the exceptions of PIL or ffmpeg propagate."""

    def __len__(self) -> int: ...

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        """Yield the frames at ascending `indices`, in RGB."""
        ...


class Animation:
    """An animated .gif, .webp or .png.

    Encoders merge equal consecutive frames into one of longer duration; it counts as several frames here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def frame_at_tick(self) -> list[int]:
        """Index of the stored frame shown at each tick; a tick is the median frame duration."""
        durations = []
        with Image.open(self.path) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()  # a .webp has no duration before
                durations.append(frame.info.get("duration", 0))
        tick = median_low(durations) or 1
        return [i for i, duration in enumerate(durations) for _ in range(max(1, round(duration / tick)))]

    def __len__(self) -> int:
        return len(self.frame_at_tick)

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        with Image.open(self.path) as image:
            for i in indices:
                image.seek(self.frame_at_tick[i])
                yield image.convert("RGB")


class VideoFile:
    """A video decoded by ffmpeg at a constant rate, so that frames are evenly spaced even if the file's are not."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # begins with "/", so ffmpeg cannot take it for an option
        self.library = ffmpeg(f"a {path.suffix.lower()}")

    def __len__(self) -> int:
        return sum(1 for _ in self._frames("gray", 8)[1])  # the header holds only an estimate

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        info, frames = self._frames()
        wanted = set(indices)
        for i, frame in enumerate(frames):
            if i in wanted:
                yield Image.frombytes("RGB", info["size"], frame)
            if i == indices[-1]:
                frames.close()  # do not decode the rest

    def _frames(self, pix_fmt: str = "rgb24", bits: int = 24) -> tuple[dict[str, Any], Any]:
        """Metadata of the video, and a generator of its frames as bytes with `bits` per pixel."""
        local = ["-protocol_whitelist", "file"]  # a disguised playlist must not open connections
        frames = self.library.read_frames(self.path, pix_fmt, bits_per_pixel=bits, input_params=local)
        return next(frames), frames


class FrameFolder:
    """A folder of images in natural order of their names: frame_2 comes before frame_10."""

    def __init__(self, path: Path) -> None:
        files = (p for p in path.iterdir() if p.suffix.lower() in STILLS and not p.name.startswith("."))
        self.files = sorted(files, key=_natural_key)

    def __len__(self) -> int:
        return len(self.files)

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        for i in indices:
            with Image.open(self.files[i]) as image:
                yield image.convert("RGB")


def _natural_key(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def footage(path: Path) -> Footage:
    """Open a file or a folder as footage. Raises ValueError if it does not exist or its suffix is unknown."""
    if path.is_dir():
        return FrameFolder(path)
    if not path.is_file():
        raise ValueError(f"there is no video {path}")
    if path.suffix.lower() in FILMS:
        return VideoFile(path)
    if path.suffix.lower() in ANIMATIONS:
        return Animation(path)
    known = ", ".join((*ANIMATIONS, *FILMS))
    raise ValueError(f"{path} is not a video: it must end in {known}, or be a folder of frames")


def read_video(path: Path, frames: int, size: tuple[int, int]) -> Tensor:
    """Read a video as (F, 3, H, W) in [0, 1] at `size` = (height, width), with `frames` frames evenly spaced over it.

    Taking the first frames at the model's rate would not do: the prompt describes the whole video, and folders and many
    .gif files have no frame rate. Videos longer than the model's therefore appear faster and are better cut beforehand.
    Raises ValueError, naming the file, if the video has fewer frames: repeating some would teach standing still.
    """
    try:
        source = footage(path)
        if (available := len(source)) >= frames:
            return stack([tensor_of(frame, size) for frame in source.pick(evenly_spaced(available, frames))])
    except (OSError, EOFError, SyntaxError, RuntimeError) as error:  # raised by PIL and ffmpeg
        raise ValueError(f"the video {path} cannot be read") from error
    raise ValueError(
        f"the video {path} has {available} frame(s), fewer than the {frames} of resolution.train.frames: lower that, "
        "or give a longer video"
    )
