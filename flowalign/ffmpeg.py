"""The library that reads and writes films, which is optional."""

from __future__ import annotations

from typing import Any


def ffmpeg(what: str) -> Any:
    """The module imageio_ffmpeg; ValueError with how to get it where it is absent, for `what` needs it."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ValueError(f"{what} needs the video extra (pip install 'flowalign[video]'), a .gif nothing.") from None
    return imageio_ffmpeg
