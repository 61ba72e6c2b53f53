"""OCR reward of Flow-GRPO (arXiv:2505.05470): does an image show the text that its prompt asks for?"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.rewards.base import FrameReward
from flowalign.rewards.drawings import check_order, noise, render_text
from flowalign.rewards.pixels import as_bytes
from flowalign.rewards.readers import READERS, Reader

QUOTED = re.compile('"([^"]+)"|“([^”]+)”')


class OCR(FrameReward):
    """1 - min(edit distance, n) / n in [0, 1] for a text of n characters; (B,), the mean over the frames of a video.

    The text is `text` of the prompt's line, or else the first quotation in the prompt. Whitespace and case are ignored.
    As in Flow-GRPO's code, an image that contains the whole text scores 1 whatever other text it shows; with `alone`
    the other text counts against it.
    """

    def __init__(
        self,
        engine: Literal["rapidocr", "tesseract"] = "rapidocr",
        min_confidence: float = 0.0,
        alone: bool = False,
    ) -> None:
        """min_confidence: pieces of text with a lower confidence of the engine, in [0, 1], are ignored."""
        if engine not in READERS:
            raise ValueError(f"engine is one of {', '.join(READERS)} (got {engine}).")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence is in [0, 1] (got {min_confidence}).")
        self.engine, self.min_confidence, self.alone = engine, min_confidence, alone

    @cached_property
    def reader(self) -> Reader:
        return READERS[self.engine]()

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        """Raise ValueError if no text is asked for."""
        wanted_text(prompt, metadata)

    def score(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        wanted = [wanted_text(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
        scores = [self._agreement(self.read(p), text) for p, text in zip(pictures, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def read(self, picture: Tensor) -> str:
        """Read the text in an image (3, H, W), in lower case without whitespace."""
        pieces = self.reader(as_bytes(picture))
        return normalise("".join(text for text, confidence in pieces if confidence >= self.min_confidence))

    def self_check(self) -> None:
        """Raise RewardError if the engine is missing or does not rank a word above another one and noise."""
        pictures = torch.stack([render_text("GARDEN"), render_text("CARBON"), noise()])
        scores = self.score(pictures, ["a sign"] * 3, [{"text": "GARDEN"}] * 3).tolist()
        check_order(f"OCR by {self.engine}", scores, "GARDEN, CARBON and noise by how much of GARDEN they show")

    def _agreement(self, found: str, text: str) -> float:
        if text in found and not self.alone:
            return 1.0
        return 1 - min(edit_distance(found, text), len(text)) / len(text)


def wanted_text(prompt: str, entry: dict[str, Any]) -> str:
    """The text that an image of this prompt should show, normalised. Raises ValueError if there is none."""
    quoted = QUOTED.search(prompt)
    text = entry.get("text", next(filter(None, quoted.groups())) if quoted else "")
    if not isinstance(text, str) or not normalise(text):
        raise ValueError(
            "the OCR reward looks for a text: put it into double quotes in the prompt, or give the line a `text` "
            f"(prompt: {prompt!r})."
        )
    return normalise(text)


def normalise(text: str) -> str:
    """Remove whitespace and convert to lower case."""
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: minimum number of insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
