"""The size of an image or a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, and for videos the number of frames."""

    height: int
    width: int
    frames: int | None = None
    fps: float | None = None
    """Frames per second of a written video; None: 16."""

    @staticmethod
    def of(sides: Any) -> Size:
        """From the side of a square, [height, width] or [height, width, frames]. Else raises ValueError."""
        given = [sides, sides] if type(sides) is int else sides
        if not isinstance(given, list) or len(given) not in (2, 3) or not all(type(n) is int for n in given):
            raise ValueError(
                "a resolution is the side of a square, [height, width], [height, width, frames], or a mapping "
                f"(got {sides})."
            )
        return Size(*given)

    @property
    def area(self) -> tuple[int, int, int | None]:
        """(height, width, frames), the arguments of a model's methods."""
        return (self.height, self.width, self.frames)
