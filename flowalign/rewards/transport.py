"""Requests to equal replicas of a service: time-outs, retries with back-off, failover, and an end in bounded time."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from flowalign.rewards.base import RewardError
from flowalign.rewards.board import Board, BusyError, Errand, ForbiddenError, HopelessError, RefusedError

log = logging.getLogger("flowalign")
T = TypeVar("T")
OnFailure = Literal["drop", "stop"]
HOPELESS = {400, 413, 415, 422}  # the request's own fault
BUSY = {429, 503}
FORBIDDEN = {401, 403}
LONGEST_ANSWER = 64 << 20  # bytes
QUIET = 10.0
"""Seconds after which a wait for servers is told."""


@dataclass(frozen=True)
class Patience:
    """Seconds, and how often."""

    connect: float = 5.0
    """To a server that does not even take the call."""
    read: float = 120.0
    """One answer, from the request to its last byte."""
    total: float = 600.0
    """One call of the reward, whatever happens."""
    retries: int = 3
    """After so many failures more a request is given up, and after so many in a row a replica, for this call."""
    backoff: float = 0.5
    """Rest of a replica after a failure, doubled by each one that follows."""
    longest: float = 30.0
    """Rest at most."""
    start: float = 600.0
    """What a server may take to load its models, before training begins."""

    def __post_init__(self) -> None:
        for name in ("connect", "read", "total", "longest", "start"):
            if not getattr(self, name) > 0:
                raise ValueError(f"patience.{name} is a time in seconds above 0 (got {getattr(self, name)}).")
        if self.retries < 0 or self.backoff < 0:
            raise ValueError(f"retries and backoff are at least 0 (got {self.retries}, {self.backoff}).")

    def rest(self, failures: int) -> float:
        """Exponential, with jitter from a generator of its own: it decides when something is asked, and no more."""
        return min(self.longest, self.backoff * 2 ** min(failures, 30)) * _jitter.uniform(0.5, 1)


_jitter = random.Random()


class Replica:
    """One server: requests with limits in time and size, over connections that are kept."""

    def __init__(self, url: str, patience: Patience, token_env: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no address of a server: it has the form http://host:port.")
        self.url, self.patience, self.token_env = url.rstrip("/"), patience, token_env
        self.failures, self.failed_last, self.rests_until = 0, 0.0, 0.0
        self._secure, self._direct = parts.scheme == "https", _is_here(parts.hostname)
        self._client: Any = None
        self._lock = threading.Lock()

    def request(self, method: str, path: str, body: bytes | None, seconds: float) -> bytes:
        """The body of a good answer; `RefusedError` with the reason for everything else."""
        httpx, seconds = _httpx(), max(min(seconds, self.patience.read), 0.01)
        limits, until = httpx.Timeout(seconds, connect=min(self.patience.connect, seconds)), time.monotonic() + seconds
        try:
            with self._opened().stream(method, self.url + path, content=body, timeout=limits) as response:
                found = bytearray()
                for part in response.iter_bytes():
                    found += part
                    if len(found) > LONGEST_ANSWER:
                        raise RefusedError(f"{self.url} answered more than {LONGEST_ANSWER} bytes")
                    if time.monotonic() > until:
                        raise RefusedError(f"{self.url} had not ended its answer in time")
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise RefusedError(f"{self.url}: {type(error).__name__} {error}".rstrip()) from error
        if response.status_code != 200:
            raise self._refusal(response.status_code, bytes(found), response.headers.get("retry-after", ""))
        return bytes(found)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None

    def _refusal(self, status: int, body: bytes, retry_after: str) -> RefusedError:
        said = f"{self.url} answered {status}: {' '.join(body[:400].decode(errors='replace').split())}"
        if status in BUSY:
            return BusyError(said, float(retry_after) if retry_after.isdigit() else self.patience.backoff)
        if status in FORBIDDEN:
            return ForbiddenError(f"{said} (the token is that of the environment variable {self.token_env})")
        return HopelessError(said) if status in HOPELESS else RefusedError(said)

    def _opened(self) -> Any:
        """Made when first needed, in the process that uses it. A proxy is not asked the way to this machine."""
        with self._lock:
            if self._client is None:
                secret = os.environ.get(self.token_env)
                headers = {"content-type": "application/json"}
                headers |= {"authorization": f"Bearer {secret}"} if secret else {}
                # Without https there is no certificate to verify, and reading those of the system takes a while.
                self._client = _httpx().Client(
                    headers=headers,
                    trust_env=not self._direct,
                    verify=self._secure,
                    limits=_httpx().Limits(max_connections=None),
                )
            return self._client


class Replicas:
    """Several servers that answer alike; `in_flight` requests wait at each of them."""

    def __init__(self, urls: Sequence[str], patience: Patience, token_env: str, in_flight: int) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"urls are the addresses of one or more servers, each once (got {list(urls)}).")
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1 (got {in_flight}).")
        self.replicas = [Replica(url, patience, token_env) for url in urls]
        self.patience, self.in_flight = patience, in_flight

    def ask(self, errands: Sequence[Errand]) -> None:
        """Gives each errand its result, or the reason why there is none, in `patience.total` seconds at most."""
        if not errands:
            return
        for replica in self.replicas:
            replica.failures = min(replica.failures, self.patience.retries)  # every call gives it another chance
        board = Board(errands, self.replicas, self.patience.retries, time.monotonic() + self.patience.total)
        for replica in self.replicas:
            for _ in range(min(self.in_flight, len(errands))):
                # A daemon: whoever hangs in a socket is left behind, and his answer is not read any more.
                threading.Thread(target=self._carry, args=(replica, board), daemon=True).start()
        try:
            board.wait()
        finally:
            board.close()

    def ready(self, look: Callable[[Replica], T]) -> dict[str, T]:
        """What `look` finds at the replicas that answer, by address, as soon as one does.

        A refusal means that a replica is not ready yet; RewardError if that is so for all until `patience.start`, or if
        one does not know us, which waiting would not change.
        """
        began, trouble, told = time.monotonic(), "", False
        while True:
            found: dict[str, T] = {}
            for replica in self.replicas:
                try:
                    found[replica.url] = look(replica)
                except ForbiddenError as error:
                    raise RewardError(str(error)) from error
                except RefusedError as error:
                    trouble = str(error)
            if found:
                return found
            waited = time.monotonic() - began
            if waited > self.patience.start:
                raise RewardError(f"no server was ready within {self.patience.start:g} s: {trouble}")
            if waited >= QUIET and not told:  # what never gets ready, as a wrong path, should not take that long to see
                log.warning("waiting up to %g s for a reward server: %s", self.patience.start, trouble)
                told = True
            time.sleep(0.5)

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()

    def _carry(self, replica: Replica, board: Board) -> None:
        while errand := board.take(replica):
            try:
                answer = replica.request("POST", errand.path, errand.body(), board.until - time.monotonic())
                board.settle(errand, replica, _read(errand, answer))
            except BusyError as busy:
                rest = min(busy.seconds, self.patience.longest) * _jitter.uniform(0.5, 1)
                board.postpone(errand, replica, str(busy), rest)
            except HopelessError as hopeless:
                board.dismiss(errand, str(hopeless))
            except RefusedError as refused:
                board.fail(errand, replica, str(refused), self.patience.rest(replica.failures))
            except Exception as error:
                board.broken(error)


def _read(errand: Errand, answer: bytes) -> Any:
    """Nothing that another program may write can stop the run."""
    try:
        return errand.read(answer)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"an answer cannot be read ({type(error).__name__}: {error})") from error


def report(name: str, errands: Sequence[Errand], lost: int, samples: int, on_failure: OnFailure) -> None:
    """Says how many samples could not be scored and why, as a warning, or as the `RewardError` that stops the run."""
    reasons = list(dict.fromkeys(errand.reason for errand in errands if errand.reason))
    if not reasons:
        return
    more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
    said = f"{name}: {lost} of {samples} samples could not be scored: {reasons[0]}{more}"
    if on_failure == "stop":
        raise RewardError(said)
    log.warning("%s", said)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise ValueError("rewards over HTTP need the extra of that name: pip install 'flowalign[remote]'.") from None
    return httpx


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
