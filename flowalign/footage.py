"""Videos that are given: an animation, a film or a folder of frames becomes as many frames as a model makes."""

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
from flowalign.rewards.frames import chosen

ANIMATIONS, FILMS = (".gif", ".webp", ".png", ".apng"), (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""What counts as a frame in a folder; all else there is left alone."""


class Footage(Protocol):
    """Frames in the order of time. What is torn raises whatever its library raises."""

    def __len__(self) -> int: ...

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        """Those frames, in RGB; indices ascend."""
        ...


class Animation:
    """A .gif, .webp or .png that moves. Writers join equal frames into a longer one, which counts as several here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def shown(self) -> list[int]:
        """Which of the stored frames is seen at each tick, a tick being the usual duration of one."""
        durations = []
        with Image.open(self.path) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()  # before which a .webp knows no duration
                durations.append(frame.info.get("duration", 0))
        tick = median_low(durations) or 1
        return [i for i, duration in enumerate(durations) for _ in range(max(1, round(duration / tick)))]

    def __len__(self) -> int:
        return len(self.shown)

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        with Image.open(self.path) as image:
            for i in indices:
                image.seek(self.shown[i])
                yield image.convert("RGB")


class Film:
    """What ffmpeg decodes: at its constant rate, so that frames are even in time where a file's own are not."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()  # which no option of a command line begins like
        self.library = ffmpeg(f"a {path.suffix.lower()}")

    def __len__(self) -> int:
        return sum(1 for _ in self._frames("gray", 8)[1])  # its header only estimates

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        facts, frames = self._frames()
        wanted = set(indices)
        for i, frame in enumerate(frames):
            if i in wanted:
                yield Image.frombytes("RGB", facts["size"], frame)
            if i == indices[-1]:
                frames.close()  # the rest need not be decoded

    def _frames(self, pix_fmt: str = "rgb24", bits: int = 24) -> tuple[dict[str, Any], Any]:
        """What is known of the film, and a generator of its frames, so many bits a pixel."""
        local = ["-protocol_whitelist", "file"]  # a playlist in disguise opens no connection
        frames = self.library.read_frames(self.path, pix_fmt, bits_per_pixel=bits, input_params=local)
        return next(frames), frames


class Folder:
    """Pictures by name, numbers in names by their value: frame_2 comes before frame_10."""

    def __init__(self, path: Path) -> None:
        files = (p for p in path.iterdir() if p.suffix.lower() in STILLS and not p.name.startswith("."))
        self.files = sorted(files, key=_by_number)

    def __len__(self) -> int:
        return len(self.files)

    def pick(self, indices: list[int]) -> Iterator[Image.Image]:
        for i in indices:
            with Image.open(self.files[i]) as image:
                yield image.convert("RGB")


def _by_number(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def footage(path: Path) -> Footage:
    """What can be read of a file or a folder; ValueError, in a sentence, where nothing is there or can be."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise ValueError(f"there is no video {path}")
    if path.suffix.lower() in FILMS:
        return Film(path)
    if path.suffix.lower() in ANIMATIONS:
        return Animation(path)
    known = ", ".join((*ANIMATIONS, *FILMS))
    raise ValueError(f"{path} is no video: it must end in {known}, or be a folder of frames")


def read(path: Path, frames: int, size: tuple[int, int]) -> Tensor:
    """(F, 3, H, W) in [0, 1], of a size (height, width): frames evenly spread from the first to the last.

    Not the first ones at the model's rate: a prompt describes the whole, and neither a folder nor many a .gif knows its
    rate. What takes longer than the model's videos do is hence seen faster, and is better cut beforehand.
    Raises ValueError, naming the file, where there are fewer frames: repeated ones would teach standing still.
    """
    try:
        source = footage(path)
        if (there := len(source)) >= frames:
            return stack([tensor_of(frame, size) for frame in source.pick(chosen(there, frames))])
    except (OSError, EOFError, SyntaxError, RuntimeError) as error:  # of PIL and ffmpeg
        raise ValueError(f"the video {path} cannot be read") from error
    raise ValueError(
        f"the video {path} has {there} frame(s), fewer than the {frames} of resolution.train.frames: lower that, or "
        "give a longer video"
    )
