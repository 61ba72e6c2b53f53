"""The pictures and videos that a prompt's line names: paths beside the prompt file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from flowalign.footage import footage
from flowalign.pixels import tensor_of

if TYPE_CHECKING:
    from flowalign.prompts import Prompt


def seen_pictures(prompt: Prompt) -> list[Path]:
    """Files of the pictures that a prompt comes with: its `image`, or its `images`."""
    named = prompt.metadata.get("images", prompt.metadata.get("image", []))
    if (paths := _paths(prompt, named)) is None:
        raise ValueError(
            f"{prompt.source}: this model sees pictures beside a prompt: give every line an `image` (a path beside the "
            f"prompt file) or `images` (a list of them), not {named!r}"
        )
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{prompt.source}: there is no picture {path}")
    return paths


def pictures_of(prompt: Prompt, size: tuple[int, int] | None = None) -> list[Tensor]:
    """The pictures that a prompt comes with, (3, H, W) float32 in [0, 1]; scaled to cover a size and cut to it."""
    pictures = []
    for path in seen_pictures(prompt):
        try:
            with Image.open(path) as image:
                picture = image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{prompt.source}: the picture {path} cannot be read") from error
        pictures.append(tensor_of(picture, size))
    return pictures


def given_videos(prompt: Prompt) -> list[Path]:
    """Files, or folders of frames, that can be learnt from: its `video`, or its `videos`."""
    named = prompt.metadata.get("videos", prompt.metadata.get("video", []))
    if (paths := _paths(prompt, named)) is None:
        raise ValueError(
            f"{prompt.source}: no video to learn from: give every line a `video` (a file or a folder of frames beside "
            f"the prompt file{instead(prompt, 'image')}) or `videos` (a list of them)"
        )
    return paths


def check_videos(prompt: Prompt) -> None:
    """Raises ValueError unless the line names videos that are there and of a kind that can be read."""
    for path in given_videos(prompt):
        with _told(prompt):
            footage(path)


def video_of(prompt: Prompt, number: int, reading: Callable[[Path], Tensor]) -> Tensor:
    """What `reading` makes of the video of a prompt, or of the one of its videos that a number says."""
    videos = given_videos(prompt)
    with _told(prompt):
        return reading(videos[number % len(videos)])


def instead(prompt: Prompt, key: str) -> str:
    """For a sentence about what is missing: what the line names is of the other kind."""
    return f", not {'an' if key == 'image' else 'a'} `{key}`" if key in prompt.metadata else ""


def _paths(prompt: Prompt, named: Any) -> list[Path] | None:
    """Of a name or a list of names; None of anything else, and of nothing."""
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        return None
    return [Path(prompt.source.rpartition(":")[0]).parent / name for name in named]


@contextmanager
def _told(prompt: Prompt) -> Iterator[None]:
    """A ValueError inside says of which line it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prompt.source}: {error}") from error
