"""A reward server whose URL selects how it fails: http://127.0.0.1:PORT/hangs hangs, …/garbage answers garbage.

Its correct score is the mean of an image. `python bench/faulty_reward.py` prints its port and serves until killed. The
first part of the path names the fault, an optional second one the number of correct answers before it, and a third one
the number of faulty answers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from flowalign.rewards.wire import PROTOCOL  # noqa: E402

Node = dict[str, Any]
BEGAN, SLOW = time.monotonic(), 2.0
asked, lock = Counter(), Lock()


def honest(query: Node) -> Node:
    scores = []
    for sample in query["samples"]:
        frames = [np.asarray(Image.open(BytesIO(b64decode(frame)))) for frame in sample["frames"]]
        scores.append({"id": sample["id"], "score": float(np.mean(frames)) / 255})
    return {"protocol": PROTOCOL, "request": query["request"], "served": "mean-1", "scores": scores}


def everywhere(value: Any) -> Callable[[Node], Node]:
    """Replace every score by `value`."""
    return lambda node: node | {"scores": [entry | {"score": value} for entry in node["scores"]]}


def renamed(node: Node) -> Node:
    """Replace each id by the one that the sample would have at another position in the request."""
    names = [entry["id"] for entry in node["scores"]]
    moved = [f"{(i + 1) % len(names)}-{name.split('-')[1]}" for i, name in enumerate(names)]
    if len(names) == 1:
        moved = ["0-" + "0" * 32]
    return node | {"scores": [entry | {"id": name} for entry, name in zip(node["scores"], moved, strict=True)]}


WRONG: dict[str, Callable[[Node], Node]] = {
    "wrong_id": renamed,
    "missing": lambda node: node | {"scores": node["scores"][1:]},
    "twice": lambda node: node | {"scores": [*(node["scores"][1:] or node["scores"]), node["scores"][-1]]},
    "too_many": lambda node: node | {"scores": [*node["scores"], {"id": "9-9", "score": 1.0}]},
    "other_request": lambda node: node | {"request": "0" * 32},
    "other_reward": lambda node: node | {"served": "something-else"},
    "no_score": lambda node: node | {"scores": [{"id": entry["id"]} for entry in node["scores"]]},
    "text": everywhere("good"),
    "true": everywhere(True),
    "list": everywhere([0.5]),
    "nan_literal": everywhere(float("nan")),
    "infinite": everywhere(float("inf")),
    "beyond_float32": everywhere(1e300),
    "null": everywhere(None),
    "not_an_object": lambda node: node["scores"],  # type: ignore[dict-item, return-value]
}
"""Wrong answers (all but null, which is valid: a sample without a score)."""
STATUS = {
    "error_500": (500, "RuntimeError: the reward broke"),
    "out_of_memory": (500, "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB"),
    "unauthorised": (401, "the token is missing or wrong"),
    "too_large": (413, "the request has more than 10 bytes; send fewer samples"),
    "busy": (503, "too many requests are waiting"),
    "moved": (302, ""),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:  # noqa: N802
        fault = self.path.split("/")[1]
        if fault == "slow_start" and time.monotonic() < BEGAN + SLOW:
            self._say(503, b'{"error": "the reward is starting"}')
        else:
            part = {"class": "Mean", "self_check": "none", "groupwise": False}
            self._say(200, json.dumps({"served": "mean-1", "parts": {"reward": part}}).encode())

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers["content-length"]))
        fault, *numbers = self.path.strip("/").split("/")[:-1]
        begins = int(numbers[0]) if numbers else 0
        lasts = int(numbers[1]) if numbers[1:] else sys.maxsize
        with lock:
            asked[self.path] += 1
            well = not begins < asked[self.path] <= begins + lasts
        query = json.loads(body)
        self._fail("none" if well else fault, query)

    def _fail(self, fault: str, query: Node) -> None:
        """Produce transport faults here; wrong answers and error statuses come from the tables above."""
        if fault == "slow_start" and time.monotonic() < BEGAN + SLOW:
            self._say(503, b'{"error": "the reward is starting"}')
        elif fault == "dies":
            os._exit(9)
        elif fault == "hangs":
            time.sleep(3600)
        elif fault == "trickles":
            self._head(200, 1 << 20)
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif fault == "hangs_up":
            self.close_connection = True
        elif fault == "cut_off":
            self._head(200, 1000)
            self.wfile.write(b'{"request":')
            self.close_connection = True
        elif fault == "garbage":
            self._say(200, b"<html>It works!</html>")
        elif fault in STATUS:
            status, reason = STATUS[fault]
            self._say(status, json.dumps({"error": reason}).encode())
        else:
            answer = WRONG.get(fault, dict)(honest(query))
            self._say(200, json.dumps(answer).replace("Infinity", "1e999").encode())

    def _say(self, status: int, body: bytes) -> None:
        self._head(status, len(body))
        self.wfile.write(body)

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(length))
        if status == 503:
            self.send_header("retry-after", "1")
        if status == 302:
            self.send_header("location", "http://127.0.0.1:9/score")
        self.end_headers()


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
