"""Client for a reward server: `flowalign reward-server`, or any server of the protocol in rewards/wire.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from flowalign.rewards.base import RewardError, as_videos
from flowalign.rewards.dispatch import RefusedError, Request
from flowalign.rewards.png import encode, to_uint8
from flowalign.rewards.transport import OnFailure, Patience, Replica, Replicas, report_failures
from flowalign.rewards.wire import Query, Sample, WireError, get_field, json_copy, parse_json, read_scores


class Remote:
    """Scores of a reward server, (B,) on the CPU; NaN if the server answers null or not at all.

    A call takes at most `patience.total` seconds. A missing answer never becomes a score of 0, nor is an answer ever
    assigned to another sample.
    """

    def __init__(
        self,
        urls: list[str],
        part: str = "reward",
        batch_size: int = 8,
        in_flight: int = 2,
        groupwise: bool = False,
        on_failure: OnFailure = "drop",
        token_env: str = "FLOWALIGN_REWARD_TOKEN",
        patience: Patience | None = None,
    ) -> None:
        """urls: equivalent replicas; part: which of the served rewards; batch_size: samples per request; in_flight:
        concurrent requests per replica, so that it need not wait for the next one; groupwise: whether the served reward
        compares the members of a group; on_failure: `drop` the samples (NaN) or `stop` with a RewardError.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (got {batch_size}).")
        self.patience = patience or Patience()
        self.replicas = Replicas(urls, self.patience, token_env, in_flight)
        self.part, self.batch_size, self.groupwise = part, batch_size, groupwise
        self.on_failure: OnFailure = on_failure
        self._served: str | None = None
        self._lock = threading.Lock()

    def __call__(
        self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], groups: Tensor | None = None
    ) -> Tensor:
        """See `Reward`; `groups` (B,) for groupwise rewards. Raises RewardError only with on_failure=stop."""
        videos, finite = as_videos(media, prompts, metadata)
        scores, videos = torch.full((len(videos),), torch.nan), to_uint8(videos)
        batches = self._batches(finite.nonzero().flatten().tolist(), None if groups is None else groups.tolist())
        requests = []
        for rows in batches:
            fields = [
                (prompts[i], json_copy(metadata[i], prompts[i]), None if groups is None else int(groups[i]))
                for i in rows
            ]
            requests.append(self._request(videos[rows], fields, video=media.ndim == 5))
        self.replicas.ask(requests)
        for request, rows in zip(requests, batches, strict=True):
            if not request.reason:
                scores[rows] = torch.tensor(request.result)
        lost = sum(len(rows) for request, rows in zip(requests, batches, strict=True) if request.reason)
        report_failures(f"the remote reward {self.part!r}", requests, lost, len(scores), self.on_failure)
        return scores

    def self_check(self) -> None:
        """Wait for a server. Raises RewardError if none is ready in time, or if servers differ in what they serve."""
        healthy = self.replicas.wait_until_ready(_health)
        for url, health in healthy.items():
            self._check_part(url, health)
        if len(served := {health["served"] for health in healthy.values()}) > 1:
            raise RewardError(
                f"the reward servers {', '.join(healthy)} do not serve the same reward in the same version."
            )
        self._served = served.pop()

    def close(self) -> None:
        self.replicas.close()

    # ------------------------------------------------------------ requests

    def _batches(self, rows: list[int], groups: list[int] | None) -> list[list[int]]:
        """Rows of each request: `batch_size` of them, or a whole group."""
        if not self.groupwise:
            return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        if groups is None:
            raise ValueError("a groupwise remote reward needs the group of each sample.")
        members: dict[int, list[int]] = {}
        for row in rows:
            members.setdefault(groups[row], []).append(row)
        return list(members.values())

    def _request(
        self, videos: Tensor, fields: Sequence[tuple[str, dict[str, Any], int | None]], video: bool
    ) -> Request:
        """Build a request; fields: prompt, metadata and group of each video.

        PNG encoding and hashing are left to the thread that sends it.
        """
        request_id, ids, deadline = uuid4().hex, [], time.monotonic() + self.patience.total

        def body() -> bytes:
            samples = [Sample(encode(frames), *rest) for frames, rest in zip(videos, fields, strict=True)]
            patience = min(self.patience.read, max(deadline - time.monotonic(), 0))
            query = Query(request_id, self.part, video, samples, patience)
            ids[:] = query.ids()
            return query.dump()

        return Request("/score", body, partial(self._read, request_id, ids))

    def _read(self, request_id: str, ids: Sequence[str], answer: bytes) -> list[float]:
        try:
            scores, served = read_scores(answer, request_id, ids)
        except WireError as error:
            raise RefusedError(f"invalid answer of a reward server: {error}") from error
        with self._lock:
            self._served = self._served or served
            if served != self._served:
                raise RefusedError(f"a reward server now serves {served}, and no longer {self._served}")
        return scores

    def _check_part(self, url: str, health: dict[str, Any]) -> None:
        parts = health["parts"]
        if self.part not in parts:
            raise RewardError(f"{url} does not serve {self.part!r}, but {', '.join(sorted(parts))}.")
        groupwise = get_field(parts[self.part], "groupwise", bool)
        if groupwise != self.groupwise:
            word = str(groupwise).lower()
            raise RewardError(f"{url} serves {self.part!r} as groupwise={word}: say groupwise={word} here too.")


def _health(replica: Replica) -> dict[str, Any]:
    """The health report of a server that is ready."""
    answer = replica.request("GET", "/health", None, 2 * replica.patience.connect)
    try:
        health = parse_json(answer)
        for key, kind in (("served", str), ("parts", dict)):
            get_field(health, key, kind)
    except WireError as error:
        raise RewardError(f"{replica.url} is not a reward server: {error}") from error
    return health
