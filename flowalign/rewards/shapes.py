"""Rewards of the scenes world, read from pixels on the CPU wherever these are; a video scores its frames' mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.shapes.quality import quality
from flowalign.shapes.verify import verify
from flowalign.shapes.world import Spec


def _frames(media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """(B, F, H, W, 3) float32, checked; a sample may hold non-finite values."""
    if media.ndim not in (4, 5) or media.shape[-3] != 3:
        raise ValueError(f"a reward takes media (B, 3, H, W) or (B, F, 3, H, W); got {tuple(media.shape)}")
    if not len(media) == len(prompts) == len(metadata):
        raise ValueError(
            f"{len(media)} media with {len(prompts)} prompts and {len(metadata)} metadata entries; one each is needed"
        )
    values = media.detach().float().cpu()
    finite = values[values.isfinite()]
    if finite.numel() and (finite.min() < -1e-3 or finite.max() > 1 + 1e-3):
        raise ValueError(f"media must lie in [0, 1]; got values from {finite.min():.3g} to {finite.max():.3g}")
    values = values.clamp(0, 1)  # rounding only, after the check above; NaN stays
    values = values.where(media.detach().cpu().isfinite(), torch.nan)  # infinities must not pass as white
    return (values if media.ndim == 5 else values[:, None]).movedim(-3, -1).numpy()


class _PerPicture(ABC):
    """Scores frame by frame; subclasses say how one picture is scored."""

    @abstractmethod
    def score(self, image: np.ndarray, spec: Spec) -> float: ...

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        videos = _frames(media, prompts, metadata)
        scenes = [Spec.from_metadata(entry) for entry in metadata]
        return torch.tensor([self._mean(v, s) for v, s in zip(videos, scenes, strict=True)], dtype=torch.float32)

    def _mean(self, frames: np.ndarray, spec: Spec) -> float:
        return float(np.mean([self.score(f, spec) for f in frames])) if np.isfinite(frames).all() else float("nan")


class Shapes(_PerPicture):
    """The training reward: the strict verdict and the partial agreement, weighted."""

    def __init__(self, strict_weight: float = 0.5) -> None:
        if not 0 <= strict_weight <= 1:
            raise ValueError(f"strict_weight is a share of the reward, in [0, 1]; got {strict_weight}")
        self.strict_weight = strict_weight

    def score(self, image: np.ndarray, spec: Spec) -> float:
        strict, partial = verify(image, spec)
        return self.strict_weight * strict + (1 - self.strict_weight) * partial


class Strict(_PerPicture):
    """1 where the picture shows exactly what was asked, else 0: the figure to report."""

    def score(self, image: np.ndarray, spec: Spec) -> float:
        return verify(image, spec)[0]


class Quality(_PerPicture):
    """The gold measure, never to be optimised: how much the picture looks like a real one of its kind."""

    def score(self, image: np.ndarray, spec: Spec) -> float:
        return quality(image, spec.kind)
