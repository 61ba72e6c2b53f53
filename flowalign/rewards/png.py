"""PNG encoding and decoding. Only rounding to 8 bits loses information: a value changes by at most 1/510."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(media: Tensor) -> Tensor:
    """Convert media in [0, 1] to uint8 on the CPU. Rounding on their device quarters the transfer."""
    return (media.detach() * 255).round_().byte().cpu()


def encode(pictures: Tensor) -> list[bytes]:
    """Encode images (F, 3, H, W) uint8 → F files."""
    return [_encode_one(picture) for picture in pictures.movedim(1, -1).numpy()]


def _encode_one(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 as a PNG without compression.

    This takes a sixth of the time (1.7 ms instead of 10.2 ms at 256 px) for half as many bytes more, which is faster
    overall within a cluster.
    """
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter type: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), level=0)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def decode(files: Sequence[bytes], pixels: int) -> Tensor:
    """Decode files of one image size → (F, 3, H, W) uint8.

    Raises ValueError for anything but RGB PNGs, for differing sizes, and for more than `pixels` pixels in total, which
    is read from the headers before memory is allocated.
    """
    pictures = [_open(file, i) for i, file in enumerate(files)]
    if len(sizes := {picture.size for picture in pictures}) > 1:
        raise ValueError(f"the images of a request must have the same size; these are {sorted(sizes)}")
    if (asked := sum(picture.width * picture.height for picture in pictures)) > pixels:
        raise ValueError(f"{asked} pixels exceed the limit of {pixels} per request; send fewer samples")
    try:
        values = np.stack([np.asarray(picture) for picture in pictures])
    except Exception as error:  # Pillow's decoders raise all sorts of exceptions
        raise ValueError(f"a PNG is broken: {error}") from error
    return torch.from_numpy(values).movedim(-1, 1)


def _open(file: bytes, place: int) -> Image.Image:
    try:
        picture = Image.open(BytesIO(file), formats=("PNG",))
    except Exception as error:
        raise ValueError(f"image {place} is not a PNG") from error
    if picture.mode != "RGB":
        raise ValueError(f"image {place} is a PNG of mode {picture.mode}; RGB with 8 bits per value is needed")
    return picture
