"""A detector and rewards that the tests of evaluations name in YAML files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.geneval_rules import Thing
from flowalign.shapes.verify import find
from flowalign.shapes.world import SHAPES


class SceneDetector:
    """Finds the shapes of the scenes world in pixels."""

    vocabulary = frozenset(SHAPES)

    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> list[list[Thing]]:
        del names
        return [[*self._things(picture)] for picture in pictures]

    def _things(self, picture: Tensor):
        height, width = picture.shape[-2:]
        for found in find(picture.permute(1, 2, 0).cpu().numpy()):
            if found.shape is not None:
                r = math.sqrt(found.area) / 2
                box = ((found.x - r) * width, (found.y - r) * height, (found.x + r) * width, (found.y + r) * height)
                yield Thing(found.shape, box, 0.95)


class Counted:
    """The mean of a picture; `calls` counts what it has seen, `stop` pictures are too many, `deaf` calls give NaN."""

    calls = 0
    stop = 10**9
    deaf = 0

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del prompts, metadata
        Counted.calls += len(media)
        if Counted.calls > Counted.stop:
            raise KeyboardInterrupt
        scores = media.flatten(1).mean(dim=1)
        if Counted.deaf:
            Counted.deaf -= 1
            scores[0] = torch.nan
        return scores
