"""Client for a vision-language model behind an OpenAI-compatible chat endpoint (vLLM, SGLang, …)."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from flowalign.rewards.base import RewardError
from flowalign.rewards.dispatch import RefusedError, Request
from flowalign.rewards.frames import evenly_spaced
from flowalign.rewards.png import encode
from flowalign.rewards.transport import OnFailure, Patience, Replica, Replicas, report_failures
from flowalign.rewards.wire import WireError, get_field, parse_json

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """Images (F, 3, H, W) uint8, in the order shown, followed by the text."""

    pictures: Tensor
    text: str
    samples: tuple[int, ...]
    """Indices of the samples that it is about."""


class Chat:
    """A model served by one or more replicas. Each question is one request.

    A question without an answer after all retries yields None, or with on_failure="stop" a RewardError.
    """

    def __init__(
        self,
        urls: list[str],
        model: str,
        max_tokens: int = 512,
        temperature: float = 0.0,
        in_flight: int = 16,
        frames: int = 8,
        extra: Mapping[str, Any] | None = None,
        on_failure: OnFailure = "drop",
        token_env: str = "FLOWALIGN_JUDGE_TOKEN",
        patience: Patience | None = None,
    ) -> None:
        """urls: base URLs including the path, usually /v1; frames: evenly spaced frames shown of a video; extra: more
        fields of the request."""
        if max_tokens < 1 or frames < 1:
            raise ValueError(f"max_tokens and frames must be at least 1 (got {max_tokens}, {frames}).")
        self.replicas = Replicas(urls, patience or Patience(), token_env, in_flight)
        self.model, self.frames = model, frames
        self.on_failure: OnFailure = on_failure
        self.fields = {"model": model, "max_tokens": max_tokens, "temperature": temperature} | dict(extra or {})

    def ask(self, questions: Sequence[Question], read: Callable[[dict[str, Any]], T], **fields: Any) -> list[T | None]:
        """Answers to the questions, None for failed ones.

        read: parses the first choice of an answer and may raise `RefusedError`; fields: more fields of the request.
        """
        requests = [self._request(question, read, fields) for question in questions]
        self.replicas.ask(requests)
        lost = {i for r, q in zip(requests, questions, strict=True) if r.reason for i in q.samples}
        asked = {i for question in questions for i in question.samples}
        report_failures(f"the judge {self.model}", requests, len(lost), len(asked), self.on_failure)
        return [None if request.reason else request.result for request in requests]

    def sample_frames(self, video: Tensor) -> Tensor:
        """(F, 3, H, W) → at most `self.frames` evenly spaced frames, the middle one if it is a single one."""
        return video[evenly_spaced(len(video), min(self.frames, len(video)))]

    def check(self) -> None:
        """Wait for a replica. Raises RewardError if none is ready in time, or if one does not serve the model."""
        for url, names in self.replicas.wait_until_ready(_served_models).items():
            if self.model not in names:
                raise RewardError(f"{url} does not serve {self.model}, but {', '.join(names) or 'nothing'}.")

    def close(self) -> None:
        self.replicas.close()

    def _request(self, question: Question, read: Callable[[dict[str, Any]], T], fields: Mapping[str, Any]) -> Request:
        def body() -> bytes:
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(file).decode()}"}}
                for file in encode(question.pictures)
            ]
            content.append({"type": "text", "text": question.text})
            messages = [{"role": "user", "content": content}]
            return json.dumps(self.fields | dict(fields) | {"messages": messages}).encode()

        return Request("/chat/completions", body, lambda answer: read(_choice(answer)))


def _served_models(replica: Replica) -> list[str]:
    answer = replica.request("GET", "/models", None, 2 * replica.patience.connect)
    try:
        return [get_field(entry, "id", str) for entry in get_field(parse_json(answer), "data", list)]
    except WireError as error:
        raise RewardError(f"{replica.url} is not a chat endpoint: {error}") from error


def _choice(answer: bytes) -> dict[str, Any]:
    """The first choice of an answer."""
    try:
        choices = get_field(parse_json(answer), "choices", list)
    except WireError as error:
        raise RefusedError(f"invalid answer of the judge's chat endpoint: {error}") from error
    if not choices or not isinstance(choices[0], dict):
        raise RefusedError("the judge answered without a choice")
    return choices[0]


def text_of(choice: dict[str, Any]) -> str:
    """Text of the answer without its reasoning, which ends with </think>."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise RefusedError("the judge answered without a text")
    return text.rpartition("</think>")[2].strip()
