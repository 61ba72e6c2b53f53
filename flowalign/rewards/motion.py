"""Amount and smoothness of motion in a video, two measures without a model that should be used together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowalign.rewards.base import RewardError, as_videos

SHORT_SIDE = 256
"""Maximum resolution of the flow, so that the same motion gives the same value at any video resolution."""
FLOW = {"pyr_scale": 0.5, "levels": 4, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
"""The parameters of OpenCV's example, with one more pyramid level."""


class _VideoReward(ABC):
    """Base class for rewards that score one video at a time; NaN if it is not finite."""

    frames: int
    """Minimum number of frames."""

    @abstractmethod
    def judge(self, video: Tensor) -> float:
        """Score a video (F, 3, H, W) float32 in [0, 1]."""

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        videos, finite = as_videos(media, prompts, metadata)
        if videos.shape[1] < self.frames:
            raise ValueError(f"{type(self).__name__} needs videos of at least {self.frames} frames.")
        scores = [self.judge(video) if ok else torch.nan for video, ok in zip(videos, finite.tolist(), strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


class Motion(_VideoReward):
    """Mean length of the optical flow (Farneback, 2003) between consecutive frames, in percent of the diagonal; (B,).

    top: fraction of fastest pixels to average over; 0.05 detects a small object that moves in front of a still scene,
    like VBench's dynamic degree (arXiv:2311.17982), which however uses a flow network.
    """

    frames = 2

    def __init__(self, top: float = 1.0) -> None:
        if not 0 < top <= 1:
            raise ValueError(f"top is a share of the pixels, in (0, 1] (got {top}).")
        self.top = top

    def judge(self, video: Tensor) -> float:
        grey = _grey(video)
        lengths = [self._mean_flow(first, second) for first, second in zip(grey[:-1], grey[1:], strict=True)]
        return 100 * float(np.mean(lengths)) / float(np.hypot(*grey.shape[1:]))

    def self_check(self) -> None:
        """Raise RewardError unless a fast square scores above a slow one, and that above a still one."""
        fast, slow, still = (self.judge(_moving_square(step)) for step in (4, 2, 0))
        if not fast > slow > still or still > 1e-3:
            raise RewardError(f"Motion gives {fast:.3g}, {slow:.3g}, {still:.3g} to a fast, a slow and a still square.")

    def _mean_flow(self, first: np.ndarray, second: np.ndarray) -> float:
        if find_spec("cv2") is None:
            raise RewardError("reward=motion needs OpenCV: pip install 'flowalign[motion]'.")
        import cv2

        start: Any = None
        flow = cv2.calcOpticalFlowFarneback(first, second, start, **FLOW)
        lengths = np.sort(np.hypot(flow[..., 0], flow[..., 1]), axis=None)
        return float(lengths[-max(1, round(self.top * lengths.size)) :].mean())


class Smoothness(_VideoReward):
    """1 - ½ mean |x(t+1) - 2 x(t) + x(t-1)| in [0, 1], (B,): 1 for still videos and linear fades, less for flicker."""

    frames = 3

    def judge(self, video: Tensor) -> float:
        return 1 - 0.5 * float((video[2:] - 2 * video[1:-1] + video[:-2]).abs().mean())


def _grey(video: Tensor) -> np.ndarray:
    """Greyscale (F, 3, H, W) → (F, h, w) uint8, with a short side of at most SHORT_SIDE."""
    scale = min(1.0, SHORT_SIDE / min(video.shape[-2:]))
    size = [round(side * scale) for side in video.shape[-2:]]
    grey = (video * video.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    if scale < 1:
        grey = interpolate(grey, size, mode="bilinear", antialias=True, align_corners=False)
    return (grey[:, 0].clamp(0, 1) * 255).round().byte().cpu().numpy()


def _moving_square(step: int, frames: int = 4) -> Tensor:
    """A textured square on grey that moves by `step` pixels per frame."""
    square = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    video = torch.full((frames, 3, 96, 96), 0.5)
    for number in range(frames):
        left = 24 + step * number
        video[number, :, 32:64, left : left + 32] = square
    return video
