"""Rewards of the scenes world, computed from pixels on the CPU; a video scores the mean of its frames."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.rewards.base import FrameReward, RewardError
from flowalign.shapes.quality import quality
from flowalign.shapes.render import picture
from flowalign.shapes.verify import verify
from flowalign.shapes.world import Spec, specs


class _SceneReward(FrameReward):
    """Base class for rewards that compare one image at a time with the requested scene."""

    @abstractmethod
    def judge(self, image: np.ndarray, spec: Spec) -> float:
        """Score an image (H, W, 3) in [0, 1]."""

    def self_check(self) -> None:
        """Raise RewardError unless a correct image of two objects scores above noise and above an empty image."""
        spec, noise = specs("position")[0], np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
        right = self.judge(picture(spec, seed=0), spec)
        for name, wrong in (("noise", noise), ("an empty image", np.full_like(noise, 0.95))):
            if not right > self.judge(wrong, spec):
                raise RewardError(f"{name} scores no less than an image of {spec.captions()[0]} ({right:.3f}).")

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        """Raise RewardError for a prompt without a scene."""
        del prompt
        _scene(metadata)

    def score(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del prompts
        images = pictures.cpu().movedim(-3, -1).numpy()
        scenes = [_scene(entry) for entry in metadata]
        return torch.tensor([self.judge(i, s) for i, s in zip(images, scenes, strict=True)], dtype=torch.float32)


def _scene(metadata: dict[str, Any]) -> Spec:
    try:
        return Spec.from_metadata(metadata)
    except ValueError as error:
        raise RewardError(
            f"{error}; prompts of your own need another reward, such as reward=jpeg or reward=pickscore: see "
            "docs/rewards.md."
        ) from error


class Shapes(_SceneReward):
    """The training reward: weighted mean of the strict verdict and the partial agreement."""

    def __init__(self, strict_weight: float = 0.5) -> None:
        if not 0 <= strict_weight <= 1:
            raise ValueError(f"strict_weight is a share of the reward, in [0, 1]; got {strict_weight}")
        self.strict_weight = strict_weight

    def judge(self, image: np.ndarray, spec: Spec) -> float:
        strict, partial = verify(image, spec)
        return self.strict_weight * strict + (1 - self.strict_weight) * partial


class Strict(_SceneReward):
    """1 if the image shows exactly what was asked, else 0: the figure to report."""

    def judge(self, image: np.ndarray, spec: Spec) -> float:
        return verify(image, spec)[0]


class Quality(_SceneReward):
    """The gold measure, never to be optimised: how much the image looks like a real one of its kind."""

    def judge(self, image: np.ndarray, spec: Spec) -> float:
        return quality(image, spec.kind)
