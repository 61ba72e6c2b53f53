"""GenEval (arXiv:2310.11513) as a reward: detects objects, and checks their counts, colours and positions."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.rewards.base import FrameReward, RewardError
from flowalign.rewards.geneval_colours import Colours
from flowalign.rewards.geneval_detectors import Detector
from flowalign.rewards.geneval_rules import Rules, Task, Thing, correct, partial

log = logging.getLogger("flowalign")
Measure = Literal["correct", "exact", "partial"]
_PATCHES = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.6, 0.1), "blue": (0.1, 0.2, 0.9), "yellow": (1.0, 0.9, 0.1)}


class Geneval(FrameReward):
    """How far an image shows what its metadata ask for, in [0, 1]; NaN if detection or colour naming fails.

    measure="correct": 1 if every count, colour and position holds, else 0, as in the benchmark: only the most confident
    objects are considered, and surplus ones are wrong only if the metadata exclude them.
    measure="exact": the same, but any surplus object of a requested class is wrong.
    measure="partial": the mean degree to which the demands are met, on which Flow-GRPO trains.
    """

    def __init__(
        self,
        detector: Detector,
        colours: Colours,
        measure: Measure = "partial",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        position_slack: float = 0.1,
    ) -> None:
        """threshold, counting_threshold: minimum confidence; max_objects: per class; max_overlap: IoU from which the
        less confident object is dropped, 1 = never; position_slack: see `Rules.slack`.
        """
        if measure not in ("correct", "exact", "partial"):
            raise ValueError(f"measure is correct, exact or partial (got {measure!r}).")
        self.detector, self.colours, self.measure = detector, colours, measure
        self.rules = Rules(threshold, counting_threshold, max_objects, max_overlap, position_slack)

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        """Raise ValueError for metadata of another layout."""
        del prompt
        Task.from_metadata(metadata)

    def score(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """See `FrameReward`. Raises ValueError for metadata of another layout or a class unknown to the detector."""
        del prompts
        tasks = [Task.from_metadata(entry) for entry in metadata]
        for name in dict.fromkeys(name for task in tasks for name in task.names):
            self._check_known(name)
        found = self._detect(pictures, tasks)
        return torch.tensor([self._score_one(*sample) for sample in zip(pictures, tasks, found, strict=True)])

    def self_check(self) -> None:
        """Raise RewardError if objects are found in an empty image or plain colours are misnamed."""
        empty = torch.full((1, 3, 256, 256), 0.5, device="cuda" if torch.cuda.is_available() else "cpu")
        try:
            found = self.detector.detect(empty, [sorted(self.detector.vocabulary or ["dog"])])[0]
        except RewardError:
            raise
        except Exception as error:  # libraries raise all sorts of exceptions
            raise RewardError(f"geneval: the detector does not run ({_one_line(error)}).") from error
        if found is None or self.rules.select(found, ""):
            raise RewardError("geneval: the detector finds objects in an empty image, or fails on it.")
        thing = Thing("object", (64.0, 64.0, 192.0, 192.0), 1.0)
        for colour, value in _PATCHES.items():
            patch = empty[0].clone()
            patch[:, 64:192, 64:192] = patch.new_tensor(value)[:, None, None]
            if (named := self.colours(patch, [thing])) != [colour]:
                raise RewardError(
                    f"geneval: a plain {colour} patch is called {named[0]}; the colours cannot be trusted."
                )

    def _check_known(self, name: str) -> None:
        known = self.detector.vocabulary
        if known is not None and name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(
                f"geneval: the detector does not know {name!r}{hint} Use its own words, or an open one "
                "(flowalign.rewards.geneval_detectors.WordDetector)."
            )

    def _detect(self, pictures: Tensor, tasks: Sequence[Task]) -> Sequence[Sequence[Thing] | None]:
        """Objects in each image. If the batch fails, images are retried one by one; None for those that fail again."""
        try:
            return self.detector.detect(pictures, [task.names for task in tasks])
        except RewardError:
            raise
        except Exception as error:  # out of memory, driver or library: one bad image must not end a long run
            if len(pictures) == 1:
                log.warning("geneval: detection failed on an image, which scores NaN: %s", _one_line(error))
                return [None]
            return [self._detect(p[None], [task])[0] for p, task in zip(pictures, tasks, strict=True)]

    def _score_one(self, picture: Tensor, task: Task, found: Sequence[Thing] | None) -> float:
        if found is None:
            return math.nan
        objects, slack = self.rules.select(found, task.tag), self.rules.slack

        def colours(things: Sequence[Thing]) -> list[str | None]:
            return self.colours(picture, things)

        try:
            if self.measure == "partial":
                return partial(task, objects, colours, slack)
            return float(correct(task, objects, colours, slack, exact=self.measure == "exact"))
        except RewardError:
            raise
        except Exception as error:
            log.warning("geneval: naming colours failed on an image, which scores NaN: %s", _one_line(error))
            return math.nan


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
