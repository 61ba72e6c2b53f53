"""The single thread that owns the served rewards: it creates, checks, calls and closes them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from flowalign.rewards.wire import Query

log = logging.getLogger("flowalign")


class QueueFullError(Exception):
    """All slots for requests are taken."""


class ExpiredError(Exception):
    """The client no longer waits for this answer."""


@dataclass
class Job:
    """A request with its media (B, …) uint8 and the future that receives its scores."""

    query: Query
    media: Tensor
    deadline: float
    done: Future[list[float]] = field(default_factory=Future)


class Worker:
    """Scores requests one at a time, on one thread that also creates the rewards."""

    def __init__(
        self, make: Callable[[], Mapping[str, Any]], device: str, places: int, self_check: bool = True
    ) -> None:
        """make: creates the rewards by name; places: concurrent requests, each from its first byte to its answer."""
        self.self_check = self_check
        self.state: Literal["starting", "ready", "failed", "stopped"] = "starting"
        self.reason = ""
        self.on_failure: Callable[[], object] = lambda: None
        """Called if the rewards cannot be created or fail their self-check."""
        self.rewards: Mapping[str, Any] = {}
        self.busy_since: float | None = None
        self.scored = 0
        self._make, self._device = make, device
        self._slots = threading.Semaphore(places)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Finish the queued requests; after `seconds`, abandon a reward that hangs."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def acquire_slot(self) -> None:
        """Take a slot, to be returned by `release_slot`. Raises QueueFullError if there is none."""
        if not self._slots.acquire(blocking=False):
            raise QueueFullError

    def release_slot(self) -> None:
        self._slots.release()

    def submit(self, query: Query, media: Tensor) -> Future[list[float]]:
        """Queue a request. The future holds its scores, the reward's exception, or `ExpiredError`."""
        job = Job(query, media, time.monotonic() + query.patience)
        self._jobs.put(job)
        return job.done

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self.rewards = self._make()
            for name, reward in self.rewards.items():
                if self.self_check and (check := getattr(reward, "self_check", None)):
                    check()
                    log.info("the self-check of %s passed", name)
        except Exception as error:
            self.state, self.reason = "failed", f"{type(error).__name__}: {error}"
            log.debug("details", exc_info=True)
            self.on_failure()
            return
        self.state = "ready"
        log.info("ready: %s", ", ".join(self.rewards))
        while job := self._jobs.get():
            self._serve(job)
        self.state = "stopped"
        for reward in self.rewards.values():
            if close := getattr(reward, "close", None):
                close()

    def _serve(self, job: Job) -> None:
        if not job.done.set_running_or_notify_cancel():
            return
        self.busy_since = time.monotonic()
        try:
            if self.busy_since > job.deadline:
                raise ExpiredError
            with torch.inference_mode():
                scores = self._score(job)
        except BaseException as error:
            _empty_cache(error)
            # SystemExit and the like, raised by a reward, are failures of that reward and must not end the server.
            job.done.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            job.done.set_result(scores)
            self.scored += len(scores)
        finally:
            self.busy_since = None

    def _score(self, job: Job) -> list[float]:
        samples, reward = job.query.samples, self.rewards[job.query.part]
        media = job.media.to(self._device).float() / 255
        more = {}
        if getattr(reward, "groupwise", False):
            more["groups"] = torch.tensor([sample.group for sample in samples])
        found = reward(media, [s.prompt for s in samples], [s.metadata for s in samples], **more)
        scores = torch.as_tensor(found).detach().float().cpu()
        if scores.shape != (len(samples),):
            raise ValueError(f"the reward gave scores of shape {tuple(scores.shape)} for {len(samples)} samples")
        if scores.isinf().any():
            log.warning("%s gave an infinite score, which is sent as null", job.query.part)
        return scores.tolist()


def _empty_cache(error: BaseException) -> None:
    """Free cached memory after an out-of-memory error: the next request may be smaller and fit."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
