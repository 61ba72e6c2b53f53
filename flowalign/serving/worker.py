"""The one thread that owns the served rewards: it makes them, checks them, scores with them, and lets them go."""

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


class NoRoomError(Exception):
    """As many requests as are taken are here already."""


class LateError(Exception):
    """Nobody waits for this answer any more."""


@dataclass
class Job:
    """A request with its media (B, …) uint8, and where its scores go."""

    query: Query
    media: Tensor
    until: float
    done: Future[list[float]] = field(default_factory=Future)


class Worker:
    """Scores one request after the other. `make`: the rewards by name, made on this thread, which also uses them."""

    def __init__(self, make: Callable[[], Mapping[str, Any]], device: str, places: int) -> None:
        """places: requests that are in the house at a time, from their first byte to their answer."""
        self.state: Literal["starting", "ready", "failed", "stopped"] = "starting"
        self.reason = ""
        self.on_failure: Callable[[], object] = lambda: None
        """Called when the rewards cannot be made, or do not pass their own check."""
        self.rewards: Mapping[str, Any] = {}
        self.busy_since: float | None = None
        self.scored = 0
        self._make, self._device = make, device
        self._places = threading.Semaphore(places)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, name="scoring", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Finishes what is waiting, and leaves behind a reward that hangs."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def enter(self) -> None:
        """Takes a place; raises NoRoomError. `leave` gives it back."""
        if not self._places.acquire(blocking=False):
            raise NoRoomError

    def leave(self) -> None:
        self._places.release()

    def submit(self, query: Query, media: Tensor) -> Future[list[float]]:
        """The scores of a request, later; what the reward raises, or `LateError`, instead."""
        job = Job(query, media, time.monotonic() + query.patience)
        self._jobs.put(job)
        return job.done

    # ------------------------------------------------------------ the thread

    def _live(self) -> None:
        try:
            self.rewards = self._make()
            for name, reward in self.rewards.items():
                if check := getattr(reward, "self_check", None):
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
            if self.busy_since > job.until:
                raise LateError
            with torch.inference_mode():
                scores = self._score(job)
        except BaseException as error:
            _empty_cache(error)
            # What would end this process, were it raised elsewhere, is a failure of the reward like any other.
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
            log.warning("%s gave an infinite score, which goes out as null", job.query.part)
        return scores.tolist()


def _empty_cache(error: BaseException) -> None:
    """After a lack of memory the next request, perhaps a smaller one, shall find what there is."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
