"""Images and videos named in a line of a prompt file, as paths relative to that file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from flowalign.footage import footage, read_video
from flowalign.pixels import tensor_of

if TYPE_CHECKING:
    from flowalign.prompt_files import Prompt


def image_paths(prompt: Prompt) -> list[Path]:
    """Paths of a prompt's input images, from its `image` or `images`. ValueError if none is given or one is missing."""
    named = prompt.metadata.get("images", prompt.metadata.get("image", []))
    if (paths := _paths(prompt, named)) is None:
        raise ValueError(
            f"{prompt.source}: this model takes input images: give every line an `image` (a path beside the "
            f"prompt file) or `images` (a list of them), not {named!r}"
        )
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{prompt.source}: there is no image {path}")
    return paths


def check_images(prompts: Sequence[Prompt], at_most: int) -> None:
    """Raise ValueError unless all prompts have as many input images as the first one, at most that many, and all are
    there: prompts share batches, whose rows have one shape."""
    counts = [len(image_paths(prompt)) for prompt in prompts]
    for prompt, count in zip(prompts, counts, strict=True):
        if count > at_most:
            raise ValueError(f"{prompt.source}: {count} images, and this model takes at most {at_most} with a prompt")
        if count != counts[0]:
            raise ValueError(
                f"{prompt.source}: the number of images is {count}, and {counts[0]} in {prompts[0].source}: all "
                "prompts of a file need the same number, so divide them into several files and runs"
            )


def load_images(prompt: Prompt, size: tuple[int, int] | None = None) -> list[Tensor]:
    """A prompt's input images, (3, H, W) float32 in [0, 1]; with a `size`, scaled to cover it and center-cropped."""
    images = []
    for path in image_paths(prompt):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{prompt.source}: the image {path} cannot be read") from error
        images.append(tensor_of(image, size))
    return images


def video_paths(prompt: Prompt) -> list[Path]:
    """Paths of a prompt's training videos (files or folders of frames), from its `video` or `videos`."""
    named = prompt.metadata.get("videos", prompt.metadata.get("video", []))
    if (paths := _paths(prompt, named)) is None:
        raise ValueError(
            f"{prompt.source}: no video to learn from: give every line a `video` (a file or a folder of frames beside "
            f"the prompt file{other_kind_hint(prompt, 'image')}) or `videos` (a list of them)"
        )
    return paths


def check_videos(prompt: Prompt) -> None:
    """Raise ValueError unless the line names videos that exist and have a readable type."""
    for path in video_paths(prompt):
        with _naming_line(prompt):
            footage(path)


def load_video(prompt: Prompt, number: int, frames: int, size: tuple[int, int]) -> Tensor:
    """The prompt's video, (F, 3, H, W) in [0, 1]; with several, the one at `number` modulo their count."""
    videos = video_paths(prompt)
    with _naming_line(prompt):
        return read_video(videos[number % len(videos)], frames, size)


def other_kind_hint(prompt: Prompt, key: str) -> str:
    """Addition to an error about missing media if the line names media of the other kind, under `key`."""
    return f", not {'an' if key == 'image' else 'a'} `{key}`" if key in prompt.metadata else ""


def _paths(prompt: Prompt, named: Any) -> list[Path] | None:
    """Paths of a name or a non-empty list of names; None for anything else."""
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        return None
    return [Path(prompt.source.rpartition(":")[0]).parent / name for name in named]


@contextmanager
def _naming_line(prompt: Prompt) -> Iterator[None]:
    """Prefix a ValueError raised inside with the prompt's file and line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prompt.source}: {error}") from error
