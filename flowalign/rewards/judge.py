"""Pointwise scores by a vision-language model: the probability of a yes, or marks on a given scale."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import RewardError, as_videos
from flowalign.rewards.chat import Chat, Question, text_of
from flowalign.rewards.dispatch import RefusedError
from flowalign.rewards.png import to_uint8

NUMBER = r"[-+]?\d+(?:\.\d+)?"


class Judge(ABC):
    """Base class for judges that are asked one question per sample; `{prompt}` in the template becomes its prompt."""

    fields: Mapping[str, Any] = {}
    """Additional fields of the request."""

    def __init__(self, chat: Chat, template: str, check: bool = True) -> None:
        """check: whether `self_check` tests that the judge can tell a red square from a blue one."""
        self.chat, self.template, self.check = chat, template, check

    @abstractmethod
    def read(self, choice: dict[str, Any]) -> float:
        """Read a score in [0, 1] from an answer, NaN if it has none. Raises RefusedError for a malformed answer."""

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """See `Reward`. NaN if the judge could not be reached or its answer has no valid score."""
        videos, finite = as_videos(media, prompts, metadata)
        rows, videos = finite.nonzero().flatten().tolist(), to_uint8(videos)
        questions = [
            Question(self.chat.sample_frames(videos[i]), fill_template(self.template, prompts[i]), (i,)) for i in rows
        ]
        scores = torch.full((len(videos),), torch.nan)
        for i, score in zip(rows, self.chat.ask(questions, self.read, **self.fields), strict=True):
            scores[i] = torch.nan if score is None else score
        return scores

    def self_check(self) -> None:
        """Raise RewardError if the judge cannot be reached or does not score red above blue when asked for red."""
        self.chat.check()
        if self.check:
            red, blue = self(plain_squares(), ["a plain red square"] * 2, [{}, {}]).tolist()
            if not red > blue:
                raise RewardError(
                    f"the judge {self.chat.model} gives a red square {red:.3g} and a blue one {blue:.3g} for “a plain "
                    "red square”: it cannot judge (check=false if the question is another one)."
                )

    def close(self) -> None:
        self.chat.close()


class YesNo(Judge):
    """P(yes) / (P(yes) + P(no)) for the first token of the answer (VQAScore, arXiv:2404.01291, normalised by both)."""

    def __init__(
        self,
        chat: Chat,
        template: str,
        yes_words: list[str] | None = None,
        no_words: list[str] | None = None,
        top_logprobs: int = 20,
        least: float = 0.1,
        check: bool = True,
    ) -> None:
        """yes_words, no_words: case and surrounding spaces are ignored; top_logprobs: number of tokens considered;
        least: if the total probability of these words is lower, the judge did not answer and the score is NaN.
        """
        super().__init__(chat, template, check)
        self.yes, self.no = (
            {_normalised(word) for word in words} for words in (yes_words or ["yes"], no_words or ["no"])
        )
        self.least = least
        if self.yes & self.no:
            raise ValueError(f"{sorted(self.yes & self.no)} cannot mean yes and no.")
        self.fields = {"logprobs": True, "top_logprobs": top_logprobs, "max_tokens": 1}

    def read(self, choice: dict[str, Any]) -> float:
        yes, no = 0.0, 0.0
        for token, probability in _first_token(choice):
            yes += probability * (_normalised(token) in self.yes)
            no += probability * (_normalised(token) in self.no)
        return yes / (yes + no) if yes + no >= self.least else math.nan


class Rubric(Judge):
    """Weighted mean of marks that the judge writes as JSON or as `name: mark`, scaled from [low, high] to [0, 1].

    NaN if a criterion has no mark, two different ones, or one outside the scale.
    """

    def __init__(
        self,
        chat: Chat,
        template: str,
        low: float,
        high: float,
        criteria: Mapping[str, float] | None = None,
        check: bool = True,
    ) -> None:
        """criteria: names of the marks with their weights; by default a single one called `score`."""
        super().__init__(chat, template, check)
        self.low, self.high, self.criteria = low, high, dict(criteria or {"score": 1.0})
        if not high > low:
            raise ValueError(f"a scale goes from low to high (got {low} to {high}).")
        if not sum(self.criteria.values()) > 0 or min(self.criteria.values()) < 0:
            raise ValueError(f"weights of criteria are not negative, and not all 0 (got {self.criteria}).")

    def read(self, choice: dict[str, Any]) -> float:
        text = text_of(choice)
        marks = [self._mark(text, name) * weight for name, weight in self.criteria.items()]
        mean = sum(marks) / sum(self.criteria.values())
        return (mean - self.low) / (self.high - self.low)

    def _mark(self, text: str, name: str) -> float:
        """The mark with this name, from JSON objects if any has it, else after a colon; NaN if missing or ambiguous."""
        found = [node[name] for node in _json_objects(text) if name in node]
        if not found:
            line = rf"(?<![\w-]){re.escape(name)}[\s*_\"']*[:=][\s*_\"']*({NUMBER})(?:\s*/\s*({NUMBER}))?(?![\w.]*\d)"
            pairs = re.findall(line, text, re.IGNORECASE)
            found = [float(mark) if not of or float(of) == self.high else math.nan for mark, of in pairs]
        valid = {float(mark) if self._on_scale(mark) else math.nan for mark in found}
        return valid.pop() if len(valid) == 1 else math.nan

    def _on_scale(self, mark: Any) -> bool:
        return type(mark) in (int, float) and self.low <= mark <= self.high


def fill_template(template: str, prompt: str) -> str:
    """Insert the prompt into the template. Unlike str.format, this leaves other braces alone."""
    return template.replace("{prompt}", prompt)


def plain_squares() -> Tensor:
    """A red and a blue square, (2, 3, 224, 224)."""
    squares = torch.zeros(2, 3, 224, 224)
    squares[0, 0], squares[1, 2] = 1, 1
    return squares


def _first_token(choice: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The most likely first tokens with their probabilities."""
    try:
        listed = choice["logprobs"]["content"][0]["top_logprobs"]
        found = [(entry["token"], entry["logprob"]) for entry in listed]
    except (KeyError, IndexError, TypeError):
        raise RefusedError("the judge answered without top_logprobs: its server must be able to give them") from None
    for token, logprob in found:
        if not isinstance(token, str) or type(logprob) not in (int, float) or not logprob <= 1e-3:
            raise RefusedError(f"{logprob!r} is not the log-probability of a token")
        yield token, math.exp(logprob)


def _normalised(word: str) -> str:
    """Strip case, punctuation, and the markers that tokenizers use for spaces."""
    return word.strip(" \t\n▁ĠĊ.,:;!?\"'*`").casefold()


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """All JSON objects in a text."""
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            node, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(node, dict):
            yield node
