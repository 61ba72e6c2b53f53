"""Optional dependency for reading and writing video files."""

from __future__ import annotations

from typing import Any


def ffmpeg(what: str) -> Any:
    """Import imageio_ffmpeg. If it is missing, raise a ValueError that says `what` needs it and how to install it."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ValueError(f"{what} needs the video extra (pip install 'flowalign[video]'), a .gif needs none.") from None
    return imageio_ffmpeg
