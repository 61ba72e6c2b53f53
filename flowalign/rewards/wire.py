"""Protocol between a run and a reward server: JSON, with images as PNG in base64. Nothing is ever unpickled.

A sample's id consists of its index in the request and a digest of its content. The server recomputes it from what it
received and the client accepts no other, so that a score cannot belong to another image, prompt or request.
"""

from __future__ import annotations

import hashlib
import json
import math
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROTOCOL = 1
LARGEST = 3.4028234663852886e38  # maximum of float32, beyond which a score would become infinite


class WireError(ValueError):
    """An invalid message, and why."""


@dataclass(frozen=True)
class Sample:
    """One image (a single frame) or video with its prompt."""

    frames: Sequence[bytes]
    """PNG files."""
    prompt: str
    metadata: dict[str, Any]
    group: int | None = None

    def identity(self, place: int) -> str:
        """Id of the sample at index `place` of a request."""
        digest = hashlib.sha256(_dump_json([self.prompt, self.metadata, self.group]))
        for frame in self.frames:
            digest.update(hashlib.sha256(frame).digest())
        return f"{place}-{digest.hexdigest()[:32]}"


@dataclass(frozen=True)
class Query:
    """A request for scores."""

    request: str
    part: str
    """Name of the served reward."""
    video: bool
    samples: Sequence[Sample]
    patience: float
    """Seconds after which the client stops waiting for the answer."""

    def ids(self) -> list[str]:
        return [sample.identity(place) for place, sample in enumerate(self.samples)]

    def dump(self) -> bytes:
        samples = [
            {
                "id": sample.identity(place),
                "prompt": sample.prompt,
                "metadata": sample.metadata,
                "group": sample.group,
                "frames": [b64encode(frame).decode() for frame in sample.frames],
            }
            for place, sample in enumerate(self.samples)
        ]
        about = {"protocol": PROTOCOL, "request": self.request, "part": self.part, "video": self.video}
        return _dump_json(about | {"patience": self.patience, "samples": samples})

    @staticmethod
    def load(body: bytes, samples: int) -> Query:
        """Parse what `dump` writes. Raises WireError for anything else and for more than `samples` samples."""
        node = parse_json(body)
        if (protocol := get_field(node, "protocol", int)) != PROTOCOL:
            raise WireError(f"protocol {protocol} is not supported; this is protocol {PROTOCOL}")
        listed = get_field(node, "samples", list)
        if not 1 <= len(listed) <= samples:
            raise WireError(f"{len(listed)} samples in a request; 1 to {samples} are accepted")
        read = [_sample(entry, place) for place, entry in enumerate(listed)]
        if len({len(sample.frames) for sample in read}) > 1:
            raise WireError("the samples of a request must have equally many frames")
        video = get_field(node, "video", bool)
        if not video and len(read[0].frames) != 1:
            raise WireError(f"an image is one frame, and not {len(read[0].frames)}; videos say `video`: true")
        request, part = get_field(node, "request", str), get_field(node, "part", str)
        return Query(request, part, video, read, finite_number(node.get("patience"), "patience"))


def answer(query: Query, scores: Sequence[float], served: str) -> bytes:
    """Encode the answer to a query, with NaN as null. served: version of the reward that computed the scores."""
    listed = [
        {"id": name, "score": score if math.isfinite(score) else None}
        for name, score in zip(query.ids(), scores, strict=True)
    ]
    return _dump_json({"protocol": PROTOCOL, "request": query.request, "served": served, "scores": listed})


def read_scores(body: bytes, request: str, ids: Sequence[str]) -> tuple[list[float], str]:
    """Parse the scores in the order of the ids, NaN for null, and the version of the reward that computed them.

    Raises WireError for an answer to another request, for missing, unknown or duplicate ids, and for scores that are
    not finite numbers.
    """
    node = parse_json(body)
    if get_field(node, "request", str) != request:
        raise WireError("it answered another request")
    listed, found = get_field(node, "scores", list), {}
    if len(listed) != len(ids):
        raise WireError(f"it answered {len(listed)} scores for {len(ids)} samples")
    for entry in listed:
        name = get_field(entry, "id", str)
        if name in found:
            raise WireError(f"it answered sample {name} twice")
        found[name] = _score(entry)
    if unknown := found.keys() - set(ids):
        raise WireError(f"it answered for a sample that it was not asked about ({sorted(unknown)[0]})")
    return [found[name] for name in ids], get_field(node, "served", str)


def parse_json(body: bytes) -> Any:
    """Parse strict JSON, without NaN and infinity."""
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON ({error})") from error


def get_field(node: Any, key: str, kind: type) -> Any:
    """An entry of a JSON object. Raises WireError unless it is present and of exactly this type."""
    if not isinstance(node, dict) or key not in node:
        raise WireError(f"no `{key}` where one is needed")
    if type(node[key]) is not kind:
        raise WireError(f"`{key}` must be a {kind.__name__}, and not a {type(node[key]).__name__}")
    return node[key]


def finite_number(value: Any, name: str) -> float:
    """A number as a float. Raises WireError unless it is within the range of float32."""
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        raise WireError(f"{name} must be a finite number, and not {str(value)[:40]!r}")
    return float(value)


def json_copy(metadata: dict[str, Any], prompt: str) -> dict[str, Any]:
    """Metadata as the server will read them. Raises ValueError, naming the prompt, if they are not valid JSON."""
    try:
        return json.loads(_dump_json(metadata))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of {prompt!r} cannot be sent to a reward server: {error}") from error


def _score(entry: dict[str, Any]) -> float:
    if "score" not in entry:
        raise WireError("it answered a sample without a score")
    return math.nan if entry["score"] is None else finite_number(entry["score"], "a score")


def _sample(node: Any, place: int) -> Sample:
    try:
        frames = [b64decode(frame, validate=True) for frame in get_field(node, "frames", list)]
    except (TypeError, ValueError) as error:
        if isinstance(error, WireError):
            raise
        raise WireError(f"a frame of sample {place} is no base64") from error
    group = None if node.get("group") is None else get_field(node, "group", int)
    sample = Sample(frames, get_field(node, "prompt", str), get_field(node, "metadata", dict), group)
    if not frames:
        raise WireError(f"sample {place} has no frames")
    if get_field(node, "id", str) != sample.identity(place):
        raise WireError(
            f"sample {place} does not match its id: it was changed in transit, or the id is computed differently"
        )
    return sample


def _dump_json(node: Any) -> bytes:
    return json.dumps(node, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")
