"""HTTP application of the reward server: authentication, limits and error responses."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

from flowalign import __version__
from flowalign.rewards.png import decode
from flowalign.rewards.wire import PROTOCOL, Query, WireError, answer
from flowalign.serving.worker import ExpiredError, QueueFullError, Worker

log = logging.getLogger("flowalign")


@dataclass(frozen=True)
class Limits:
    """Limits of one request: size of its body, samples, pixels in all, and seconds until it must have arrived."""

    bytes: int
    samples: int
    pixels: int
    upload: float = 60.0


@dataclass(frozen=True)
class Served:
    """What the server reports that it serves."""

    reward: str
    version: str
    """Identifies exactly these rewards; another version may score differently."""


class RefusalError(Exception):
    """Error response: a status other than 200 and the reason."""

    def __init__(self, status: int, reason: str, retry_after: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


def make_app(worker: Worker, served: Served, limits: Limits, token: str | None, grace: float) -> FastAPI:
    """Create the application. grace: seconds for remaining requests to finish when the server shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop, grace)

    app = FastAPI(title="flowalign reward server", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    began = time.monotonic()

    @app.exception_handler(RefusalError)
    async def refuse(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, RefusalError)
        headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
        return _json({"error": str(refusal)}, refusal.status, headers)

    @app.get("/health")
    async def health(request: Request) -> Response:
        _authenticate(request, token)
        busy, now = worker.busy_since, time.monotonic()
        about = {
            "status": worker.state,
            "reason": worker.reason,
            "reward": served.reward,
            "served": served.version,
            "flowalign": __version__,
            "protocol": PROTOCOL,
            "parts": {name: _describe(reward, worker.self_check) for name, reward in worker.rewards.items()},
            "scored": worker.scored,
            "busy_s": 0 if busy is None else round(now - busy, 3),
            "uptime_s": round(now - began, 3),
            "limits": {"bytes": limits.bytes, "samples": limits.samples, "pixels": limits.pixels},
        }
        return _json(about, 200 if worker.state == "ready" else 503, {})

    @app.post("/score")
    async def score(request: Request) -> Response:
        try:
            _authenticate(request, token)
            if worker.state != "ready":
                raise RefusalError(503, f"the reward is {worker.state}", retry_after=1)
            worker.acquire_slot()
        except QueueFullError:
            raise await _after_draining(
                request, RefusalError(503, "too many requests are waiting", retry_after=1)
            ) from None
        except RefusalError as refusal:
            raise await _after_draining(request, refusal) from None
        try:
            query, media = await asyncio.to_thread(_parse, await _read_body(request, limits), limits, worker)
            scores = await _scores(worker, query, media)
            return Response(answer(query, scores, served.version), media_type="application/json")
        finally:
            worker.release_slot()

    return app


def _describe(reward: Any, self_check: bool) -> dict[str, Any]:
    checked = ("passed" if self_check else "skipped") if getattr(reward, "self_check", None) else "none"
    groupwise = bool(getattr(reward, "groupwise", False))
    return {"class": type(reward).__name__, "self_check": checked, "groupwise": groupwise}


def _authenticate(request: Request, token: str | None) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    # The header is decoded as latin-1, whatever was sent.
    if token is not None and not hmac.compare_digest(given.encode("latin-1"), token.encode()):
        raise RefusalError(401, "the token is missing or wrong")


async def _scores(worker: Worker, query: Query, media: Tensor) -> list[float]:
    try:
        return await asyncio.wrap_future(worker.submit(query, media))
    except ExpiredError:
        raise RefusalError(504, "the client stopped waiting before its turn came") from None
    except Exception as error:
        log.exception("the reward failed")
        raise RefusalError(500, f"{type(error).__name__}: {error}") from error


async def _read_body(request: Request, limits: Limits) -> bytes:
    """Read the body in chunks, so that neither a false content length nor a slow client ties up memory or slots."""
    too_large = RefusalError(413, f"the request has more than {limits.bytes} bytes; send fewer samples")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.upload):
            async for part in request.stream():
                body += part
                if len(body) > limits.bytes:
                    body.clear()
                    raise await _after_draining(request, too_large)
    except TimeoutError:
        raise RefusalError(408, f"the request had not arrived after {limits.upload:g} s") from None
    except ClientDisconnect:
        raise RefusalError(400, "the client disconnected") from None
    return bytes(body)


async def _after_draining(request: Request, refusal: RefusalError) -> RefusalError:
    """The refusal, once the client has sent its body or 5 s have passed.

    If the connection were closed while it is sending, the client would not see the reason.
    """
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(5):
            async for _ in request.stream():
                pass
    return refusal


def _parse(body: bytes, limits: Limits, worker: Worker) -> tuple[Query, Tensor]:
    """Parse the query and its media (B, 3, H, W) or (B, F, 3, H, W) uint8. Raises RefusalError 422 with the reason."""
    try:
        query = Query.load(body, limits.samples)
        if query.part not in worker.rewards:
            raise WireError(f"{query.part!r} is not served here, but {', '.join(sorted(worker.rewards))}")
        if getattr(worker.rewards[query.part], "groupwise", False) and any(s.group is None for s in query.samples):
            raise WireError(f"{query.part!r} compares the members of a group: every sample needs its `group`")
        media = decode([frame for sample in query.samples for frame in sample.frames], limits.pixels)
    except ValueError as error:
        raise RefusalError(422, str(error)) from error
    media = media.unflatten(0, (len(query.samples), -1))
    return query, media if query.video else media[:, 0]


def _json(node: Any, status: int, headers: dict[str, str]) -> Response:
    return Response(json.dumps(node), status, headers, media_type="application/json")
