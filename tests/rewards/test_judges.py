"""Judges before an endpoint that looks at the pictures: how red they are, or whatever a test lets it say."""

from __future__ import annotations

import json
import math
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.rewards.base import RewardError
from flowalign.rewards.chat import Chat
from flowalign.rewards.judge import Rubric, YesNo
from flowalign.rewards.judge_groups import Pairwise, Ranking
from flowalign.rewards.transport import Patience

SHORT = Patience(connect=2, read=5, total=20, retries=1, backoff=0.01, longest=0.05, start=5)
RED = torch.tensor([0.1, 0.9, 0.5, 0.3])
MEDIA = torch.stack([r * torch.tensor([1.0, 0, 0]) + (1 - r) * torch.tensor([0, 0, 1.0]) for r in RED])
MEDIA = MEDIA[:, :, None, None].expand(-1, -1, 8, 8)
PROMPTS, METADATA, GROUPS = ["red, please"] * 4, [{}] * 4, torch.zeros(4, dtype=torch.long)
Say = Callable[[list[float], str, dict[str, Any]], dict[str, Any]]


class Endpoint(ThreadingHTTPServer):
    """`say`: how red each shown picture is, the text, the request → the first choice."""

    say: Say
    asked: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._send({"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        assert isinstance(self.server, Endpoint)
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(request)
        content = request["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        files = [b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        red = [float(np.asarray(Image.open(BytesIO(file)))[..., 0].mean()) / 255 for file in files]
        self._send({"choices": [self.server.say(red, content[-1]["text"], request)]})

    def _send(self, node: Any) -> None:
        body = json.dumps(node).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def chat(endpoint: Endpoint) -> Iterator[Chat]:
    made = Chat([f"http://127.0.0.1:{endpoint.server_address[1]}/v1"], "judge", patience=SHORT, frames=2)
    yield made
    made.close()


def text(said: str) -> dict[str, Any]:
    return {"message": {"content": said}}


def tokens(probabilities: dict[str, float]) -> dict[str, Any]:
    listed = [{"token": t, "logprob": math.log(max(p, 1e-9))} for t, p in probabilities.items()]
    return {"logprobs": {"content": [{"top_logprobs": listed}]}}


# ------------------------------------------------------------ yes or no


def test_the_score_is_the_share_of_yes_among_all_ways_to_write_it(endpoint: Endpoint, chat: Chat):
    def say(red: list[float], *_: Any) -> dict[str, Any]:
        return tokens({" Yes": red[0] / 2, "yes.": red[0] / 4, "▁NO": (1 - red[0]) * 0.75, "It": 0.25})

    endpoint.say = say
    judge = YesNo(chat, "Is it {prompt}?")
    judge.self_check()
    assert torch.allclose(judge(MEDIA, PROMPTS, METADATA), RED, atol=1 / 255)
    asked = endpoint.asked[-1]
    assert asked["messages"][0]["content"][-1]["text"] == "Is it red, please?"
    assert (asked["logprobs"], asked["top_logprobs"], asked["max_tokens"], asked["temperature"]) == (True, 20, 1, 0)


def test_a_judge_that_says_something_else_has_not_judged(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda *_: tokens({"The": 0.9, "Yes": 0.05, "No": 0.01})
    assert YesNo(chat, "?")(MEDIA, PROMPTS, METADATA).isnan().all()


@pytest.mark.parametrize(
    "choice",
    [text("Yes"), {"logprobs": None}, {"logprobs": {"content": []}}, 7]
    + [
        {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": wrong}]}]}}
        for wrong in (2.5, "0", None)
    ],
)
def test_an_answer_without_log_probabilities_is_none(endpoint: Endpoint, chat: Chat, choice: Any):
    endpoint.say = lambda *_: choice
    assert YesNo(chat, "?")(MEDIA[:1], PROMPTS[:1], METADATA[:1]).isnan().all()
    chat.on_failure = "stop"
    with pytest.raises(RewardError, match="the judge judge: 1 of 1 samples could not be scored"):
        YesNo(chat, "?")(MEDIA[:1], PROMPTS[:1], METADATA[:1])


def test_a_judge_that_is_blind_is_found_out_before_training(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda *_: tokens({"Yes": 0.5, "No": 0.5})
    with pytest.raises(RewardError, match="gives a red square 0.5 and a blue one 0.5"):
        YesNo(chat, "?").self_check()
    YesNo(chat, "?", check=False).self_check()
    with pytest.raises(RewardError, match="does not serve other, but judge"):
        YesNo(Chat([chat.replicas.replicas[0].url], "other", patience=SHORT), "?").self_check()


# ------------------------------------------------------------ marks

RUBRIC = {"low": 1, "high": 5, "criteria": {"alignment": 3, "quality": 1}}
MARKS = [
    ('{"alignment": 5, "quality": 3}', 0.875),
    ('Reasons … ```json\n{"alignment": 2.5, "quality": 1}\n```', 0.28125),
    ("Alignment: 5/5\n**Quality**: 5", 1.0),
    ('<think>alignment: 1</think>{"alignment": 5, "quality": 5}', 1.0),
    ('{"alignment": 6, "quality": 3}', math.nan),  # off the scale
    ('{"alignment": 0, "quality": 3}', math.nan),
    ('{"alignment": true, "quality": 3}', math.nan),
    ('{"alignment": "5", "quality": 3}', math.nan),
    ('{"alignment": NaN, "quality": 3}', math.nan),
    ('{"alignment": 1e999, "quality": 3}', math.nan),
    ('{"alignment": ' + "9" * 400 + ', "quality": 3}', math.nan),
    ('{"quality": 3}', math.nan),
    ("alignment: 5, quality: 3/10", math.nan),  # another scale
    ("alignment: 5\nalignment: 2\nquality: 3", math.nan),  # which of them?
    ("alignment: 1.2.3 quality: 3", math.nan),
    ("misalignment: 5 quality: 3", math.nan),
    ("I cannot judge pictures.", math.nan),
    ("", math.nan),
]


@pytest.mark.parametrize(("said", "score"), MARKS, ids=[said[:40] for said, _ in MARKS])
def test_marks_count_where_they_are_plain(chat: Chat, said: str, score: float):
    found = Rubric(chat, "?", **RUBRIC).read(text(said))
    assert found == pytest.approx(score, nan_ok=True)


def test_marks_are_asked_for_every_picture(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda red, *_: text(f"It is rather red.\nFinal Score: {1 + 4 * red[0]:.2f}")
    judge = Rubric(chat, "{prompt}", 1, 5, {"Final Score": 1})
    assert torch.allclose(judge(MEDIA, PROMPTS, METADATA), RED, atol=0.01)
    broken = MEDIA.clone()
    broken[2] = torch.nan
    assert judge(broken, PROMPTS, METADATA).isnan().tolist() == [False, False, True, False]


def test_a_video_is_shown_by_its_stills(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda red, *_: text(f"score: {len(red) + red[-1]:.3f}")
    video = MEDIA[[0, 2, 1]][None]
    assert Rubric(chat, "", 0, 10)(video, [""], [{}]).item() == pytest.approx((2 + 0.9) / 10, abs=1e-3)
    chat.frames = 1  # its middle: the first one may be the picture that the whole group was made from
    assert Rubric(chat, "", 0, 10)(video, [""], [{}]).item() == pytest.approx((1 + 0.5) / 10, abs=1e-3)


# ------------------------------------------------------------ comparisons


def test_the_redder_picture_wins_more_of_its_pairs(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda red, *_: text(
        "Both are fine, A and B.\nAnswer: **" + ("A" if red[0] > red[1] else "B") + "**"
    )
    judge = Pairwise(chat, "{prompt}")
    judge.self_check()
    endpoint.asked.clear()
    assert judge(MEDIA, PROMPTS, METADATA, GROUPS).tolist() == pytest.approx([0, 1, 2 / 3, 1 / 3])
    assert len(endpoint.asked) == 4 * 3  # each of the 6 pairs in both orders


def test_a_verdict_that_follows_the_order_is_a_tie(endpoint: Endpoint, chat: Chat):
    for said in ("A", "B", "tie"):
        endpoint.say = lambda *_, said=said: text(said)
        assert Pairwise(chat, "?")(MEDIA, PROMPTS, METADATA, GROUPS).tolist() == [0.5] * 4
    with pytest.raises(RewardError, match="does not prefer a red square"):
        Pairwise(chat, "?").self_check()


def test_a_pair_counts_for_neither_unless_it_is_answered_twice(endpoint: Endpoint, chat: Chat):
    def say(red: list[float], *_: Any) -> dict[str, Any]:
        shy = abs(red[0] - 0.9) < 0.01  # says nothing where the reddest comes first
        return text("Hard to say: A, or B" if shy else "A" if red[0] > red[1] else "B")

    endpoint.say = say
    found = Pairwise(chat, "?")(MEDIA, PROMPTS, METADATA, GROUPS)
    assert found[[0, 2, 3]].tolist() == [0, 1, 0.5]
    assert found[1].isnan()


def test_only_members_of_a_group_and_only_neighbours_are_compared(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda red, *_: text("A" if red[0] > red[1] else "B")
    groups = torch.tensor([5, 8, 5, 8])
    assert Pairwise(chat, "?")(MEDIA, PROMPTS, METADATA, groups).tolist() == [0, 1, 1, 0]
    assert len(endpoint.asked) == 4
    endpoint.asked.clear()
    media, names = MEDIA.repeat(2, 1, 1, 1), PROMPTS * 2
    Pairwise(chat, "?", neighbours=2)(media, names, METADATA * 2, torch.zeros(8))
    assert len(endpoint.asked) == 2 * 8 * 2  # each meets two on either side, in both orders


def test_a_group_is_brought_into_an_order(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda red, *_: text(f"In order: {(np.argsort(red)[::-1] + 1).tolist()}")
    judge = Ranking(chat, "{prompt}")
    judge.self_check()
    assert judge(MEDIA, PROMPTS, METADATA, GROUPS).tolist() == pytest.approx([0, 1, 2 / 3, 1 / 3])
    assert judge(MEDIA, PROMPTS, METADATA, torch.tensor([3, 3, 1, 3])).nan_to_num(-1).tolist() == [0, 1, -1, 0.5]


@pytest.mark.parametrize(
    "said", ["[1, 2, 3]", "[1, 2, 3, 3]", "[0, 1, 2, 3]", "[1, 2, 3, 4, 5]", "1, 2, 3, 4", "[1,,2]", ""]
)
def test_what_is_no_order_of_the_group_does_not_count(endpoint: Endpoint, chat: Chat, said: str):
    endpoint.say = lambda *_: text(said)
    assert Ranking(chat, "?")(MEDIA, PROMPTS, METADATA, GROUPS).isnan().all()


def test_the_order_of_display_alone_gives_nobody_an_advantage(endpoint: Endpoint, chat: Chat):
    endpoint.say = lambda *_: text("[1, 2, 3, 4]")
    assert Ranking(chat, "?")(MEDIA, PROMPTS, METADATA, GROUPS).tolist() == pytest.approx([0.5] * 4)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda chat: Rubric(chat, "?", 5, 1), "from low to high"),
        (lambda chat: Rubric(chat, "?", 1, 5, {"a": -1, "b": 2}), "not negative"),
        (lambda chat: YesNo(chat, "?", ["Yes"], ["yes"]), "cannot mean yes and no"),
        (lambda chat: Pairwise(chat, "?", first="A", second="a"), "three words"),
        (lambda chat: Pairwise(chat, "?", neighbours=0), "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(chat: Chat, make: Callable[[Chat], object], hint: str):
    with pytest.raises(ValueError, match=hint):
        make(chat)
