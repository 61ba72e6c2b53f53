"""Saving of images and videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from flowalign.ffmpeg import ffmpeg
from flowalign.rewards.pixels import as_bytes

PICTURES, VIDEOS = (".png", ".jpg", ".jpeg", ".webp"), (".gif", ".mp4")


def check_suffix(target: Path, video: bool) -> None:
    """Raise ValueError, naming the possible suffixes, if the file format cannot hold an image or a video."""
    possible = VIDEOS if video else PICTURES
    if target.suffix.lower() not in possible:
        kind = "a video" if video else "a picture"
        raise ValueError(f"{target} cannot hold {kind}: its name must end in {', '.join(possible)}.")
    if target.suffix.lower() == ".mp4":
        ffmpeg("an .mp4")


def save(media: Tensor, target: Path, fps: float = 16) -> None:
    """Save an image (3, H, W) or video (F, 3, H, W) in [0, 1], in the format of the suffix (videos: .gif or .mp4)."""
    check_suffix(target, media.ndim == 4)
    target.parent.mkdir(parents=True, exist_ok=True)
    frames = as_bytes(media)
    if media.ndim == 3:
        Image.fromarray(frames).save(target)
    elif target.suffix.lower() == ".gif":
        first, *others = [Image.fromarray(frame) for frame in frames]
        first.save(target, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    else:
        _save_mp4(frames, target, fps)


def _save_mp4(frames: np.ndarray, target: Path, fps: float) -> None:
    """Write H.264. Height and width are padded to even numbers, which chroma subsampling requires."""
    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    size = (padded.shape[2], padded.shape[1])
    writer = ffmpeg("an .mp4").write_frames(str(target), size, fps=fps, codec="libx264", macro_block_size=2, quality=8)
    writer.send(None)
    for frame in padded:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
