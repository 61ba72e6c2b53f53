"""Requests to replicas of a service, with timeouts, retries with back-off, failover and a bounded total time."""

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
from flowalign.rewards.dispatch import BusyError, Dispatcher, ForbiddenError, InvalidRequestError, RefusedError, Request

log = logging.getLogger("flowalign")
T = TypeVar("T")
OnFailure = Literal["drop", "stop"]
INVALID = {400, 413, 415, 422}  # the request is at fault
BUSY = {429, 503}
FORBIDDEN = {401, 403}
MAX_ANSWER_BYTES = 64 << 20
WARN_AFTER = 10.0
"""Seconds of waiting for servers after which a warning is logged."""


@dataclass(frozen=True)
class Patience:
    """Timeouts in seconds, and retries."""

    connect: float = 5.0
    """Timeout for connecting."""
    read: float = 120.0
    """Timeout for one request, from sending to the last byte of the answer."""
    total: float = 600.0
    """Limit for one call of the reward, including all retries."""
    retries: int = 3
    """A request with more failures, or a replica with more consecutive ones, is given up for this call."""
    backoff: float = 0.5
    """Delay of a replica after a failure, doubled by each consecutive one."""
    longest: float = 30.0
    """Maximum delay."""
    start: float = 600.0
    """Limit for a server to load its models before training begins."""

    def __post_init__(self) -> None:
        for name in ("connect", "read", "total", "longest", "start"):
            if not getattr(self, name) > 0:
                raise ValueError(f"patience.{name} is a time in seconds above 0 (got {getattr(self, name)}).")
        if self.retries < 0 or self.backoff < 0:
            raise ValueError(f"retries and backoff are at least 0 (got {self.retries}, {self.backoff}).")

    def delay(self, failures: int) -> float:
        """Exponential back-off in seconds, with jitter.

        The jitter has its own generator and affects only the timing of requests.
        """
        return min(self.longest, self.backoff * 2 ** min(failures, 30)) * _jitter.uniform(0.5, 1)


_jitter = random.Random()


class Replica:
    """One server: requests of limited duration and size over a persistent connection pool."""

    def __init__(self, url: str, patience: Patience, token_env: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a server address of the form http://host:port.")
        self.url, self.patience, self.token_env = url.rstrip("/"), patience, token_env
        self.failures, self.failed_last, self.backoff_until = 0, 0.0, 0.0
        self._secure, self._direct = parts.scheme == "https", _is_loopback(parts.hostname)
        self._client: Any = None
        self._lock = threading.Lock()

    def request(self, method: str, path: str, body: bytes | None, seconds: float) -> bytes:
        """The body of an answer with status 200. Raises `RefusedError`, with the reason, for anything else."""
        httpx, seconds = _httpx(), max(min(seconds, self.patience.read), 0.01)
        timeout = httpx.Timeout(seconds, connect=min(self.patience.connect, seconds))
        deadline = time.monotonic() + seconds
        try:
            with self._get_client().stream(method, self.url + path, content=body, timeout=timeout) as response:
                content = bytearray()
                for part in response.iter_bytes():
                    content += part
                    if len(content) > MAX_ANSWER_BYTES:
                        raise RefusedError(f"{self.url} answered more than {MAX_ANSWER_BYTES} bytes")
                    if time.monotonic() > deadline:
                        raise RefusedError(f"{self.url} did not finish its answer in time")
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise RefusedError(f"{self.url}: {type(error).__name__} {error}".rstrip()) from error
        if response.status_code != 200:
            raise self._error_for(response.status_code, bytes(content), response.headers.get("retry-after", ""))
        return bytes(content)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None

    def _error_for(self, status: int, body: bytes, retry_after: str) -> RefusedError:
        message = f"{self.url} answered {status}: {' '.join(body[:400].decode(errors='replace').split())}"
        if status in BUSY:
            return BusyError(message, float(retry_after) if retry_after.isdecimal() else self.patience.backoff)
        if status in FORBIDDEN:
            return ForbiddenError(f"{message} (the token is that of the environment variable {self.token_env})")
        return InvalidRequestError(message) if status in INVALID else RefusedError(message)

    def _get_client(self) -> Any:
        """The client, created on first use, in the process that uses it. Loopback addresses bypass any proxy."""
        with self._lock:
            if self._client is None:
                secret = os.environ.get(self.token_env)
                headers = {"content-type": b"application/json"}
                headers |= {"authorization": f"Bearer {secret}".encode()} if secret else {}
                # Plain http has no certificates to verify, and loading the system's takes a while.
                self._client = _httpx().Client(
                    headers=headers,
                    trust_env=not self._direct,
                    verify=self._secure,
                    limits=_httpx().Limits(max_connections=None),
                )
            return self._client


class Replicas:
    """Equivalent servers, each with up to `in_flight` concurrent requests."""

    def __init__(self, urls: Sequence[str], patience: Patience, token_env: str, in_flight: int) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise ValueError(f"urls are the addresses of one or more servers, each once (got {list(urls)}).")
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1 (got {in_flight}).")
        self.replicas = [Replica(url, patience, token_env) for url in urls]
        self.patience, self.in_flight = patience, in_flight

    def ask(self, requests: Sequence[Request]) -> None:
        """Set the result of each request, or the reason why there is none, within `patience.total` seconds."""
        if not requests:
            return
        for replica in self.replicas:
            replica.failures = min(
                replica.failures, self.patience.retries
            )  # every call gives each replica another chance
        dispatcher = Dispatcher(requests, self.replicas, self.patience.retries, time.monotonic() + self.patience.total)
        for replica in self.replicas:
            for _ in range(min(self.in_flight, len(requests))):
                # A daemon, so that a thread stuck in a socket can be abandoned; its answer is discarded.
                threading.Thread(target=self._send_loop, args=(replica, dispatcher), daemon=True).start()
        try:
            dispatcher.wait()
        finally:
            dispatcher.close()

    def wait_until_ready(self, probe: Callable[[Replica], T]) -> dict[str, T]:
        """Results of `probe` by URL, for the replicas that answer, as soon as one does.

        `RefusedError` means that a replica is not ready yet. Raises RewardError if none is ready within
        `patience.start`, or at once if one rejects our credentials, since waiting would not help.
        """
        began, last_error, warned = time.monotonic(), "", False
        while True:
            found: dict[str, T] = {}
            for replica in self.replicas:
                try:
                    found[replica.url] = probe(replica)
                except ForbiddenError as error:
                    raise RewardError(str(error)) from error
                except RefusedError as error:
                    last_error = str(error)
            if found:
                return found
            waited = time.monotonic() - began
            if waited > self.patience.start:
                raise RewardError(f"no server was ready within {self.patience.start:g} s: {last_error}")
            if waited >= WARN_AFTER and not warned:  # so that a mistake such as a wrong path shows early
                log.warning("waiting up to %g s for a reward server: %s", self.patience.start, last_error)
                warned = True
            time.sleep(0.5)

    def close(self) -> None:
        for replica in self.replicas:
            replica.close()

    def _send_loop(self, replica: Replica, dispatcher: Dispatcher) -> None:
        while request := dispatcher.take(replica):
            try:
                answer = replica.request("POST", request.path, request.body(), dispatcher.deadline - time.monotonic())
                dispatcher.complete(request, replica, _read(request, answer))
            except BusyError as busy:
                delay = min(busy.seconds, self.patience.longest) * _jitter.uniform(0.5, 1)
                dispatcher.postpone(request, replica, str(busy), delay)
            except InvalidRequestError as invalid:
                dispatcher.reject(request, str(invalid))
            except RefusedError as refused:
                dispatcher.fail(request, replica, str(refused), self.patience.delay(replica.failures))
            except Exception as error:
                dispatcher.abort(error)


def _read(request: Request, answer: bytes) -> Any:
    """Parse an answer; any error becomes a RefusedError, so that no content of an answer can stop the run."""
    try:
        return request.read(answer)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"an answer cannot be read ({type(error).__name__}: {error})") from error


def report_failures(name: str, requests: Sequence[Request], lost: int, samples: int, on_failure: OnFailure) -> None:
    """Report how many samples could not be scored and why: a warning, or with on_failure="stop" a `RewardError`."""
    reasons = list(dict.fromkeys(request.reason for request in requests if request.reason))
    if not reasons:
        return
    more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
    message = f"{name}: {lost} of {samples} samples could not be scored: {reasons[0]}{more}"
    if on_failure == "stop":
        raise RewardError(message)
    log.warning("%s", message)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise ValueError("rewards over HTTP need the remote extra: pip install 'flowalign[remote]'.") from None
    return httpx


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
