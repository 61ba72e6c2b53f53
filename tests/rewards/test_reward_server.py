"""`flowalign reward-server` as a process: what it refuses, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from bench.marked import marked
from flowalign.rewards.base import RewardError
from flowalign.rewards.png import encode, to_uint8
from flowalign.rewards.remote import Remote
from flowalign.rewards.transport import Patience
from flowalign.rewards.wire import Query, Sample
from tests.conftest import ROOT

SECRET = "a secret"
OPTION = """
_target_: flowalign.scoring.Scorer
objective: { _target_: bench.marked.Marked, seconds: 0 }
held_out:
  members: { _target_: bench.marked.Members }
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    def remote(self, **settings: Any) -> Remote:
        return Remote([self.url], **({"patience": Patience(read=60, total=60, retries=0, backoff=0.01)} | settings))

    def post(self, body: bytes, token: str = SECRET) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        with httpx.Client(trust_env=False, timeout=60) as client:
            return client.post(f"{self.url}/score", content=body, headers=headers)

    def health(self) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {SECRET}"}
        return httpx.get(f"{self.url}/health", headers=headers, trust_env=False, verify=False).json()


def launched(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "reward").mkdir(exist_ok=True)
    (folder / "reward" / "marked.yaml").write_text(OPTION)
    return command("reward=marked", f"config_dir={folder}", *words)


def command(*words: str, path: Path = ROOT) -> subprocess.Popen[str]:
    environment = os.environ | {"FLOWALIGN_REWARD_TOKEN": SECRET, "PYTHONPATH": f"{path}:{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [sys.executable, "-m", "flowalign.cli", "reward-server", "port=0", *words]
    return subprocess.Popen(line, cwd=ROOT, env=environment, **pipes)


def announced(process: subprocess.Popen[str]) -> Server:
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found, process.communicate()[1][-2000:]
    return Server(process, found[0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    os.environ["FLOWALIGN_REWARD_TOKEN"] = SECRET
    limits = ("places=2", "max_samples=8", "max_mib=1", "max_megapixels=1")
    found = announced(launched(tmp_path_factory.mktemp("served"), *limits))
    found.remote().self_check()
    yield found
    found.process.kill()
    found.process.communicate()
    del os.environ["FLOWALIGN_REWARD_TOKEN"]


def body(media: torch.Tensor, video: bool = False, **changes: Any) -> dict[str, Any]:
    samples = [Sample(encode(frames if frames.ndim == 4 else frames[None]), "", {}) for frames in to_uint8(media)]
    return json.loads(Query("request", "reward", video, samples, 30).dump()) | changes


NUMBERS = [3, 70_000, 16_777_215, 0, 255, 9, 8, 1, 2, 4, 6]
MEDIA = marked(NUMBERS)
PROMPTS, METADATA = [f"picture {i}" for i in range(len(NUMBERS))], [{} for _ in NUMBERS]


def test_every_picture_gets_its_own_score(server: Server):
    assert server.remote(batch_size=2)(MEDIA, PROMPTS, METADATA).tolist() == NUMBERS


def test_a_video_comes_whole_and_in_order(server: Server):
    videos = torch.stack([MEDIA[:4], MEDIA[4:8]])
    assert server.remote()(videos, PROMPTS[:2], METADATA[:2]).tolist() == [NUMBERS[3], NUMBERS[7]]
    assert server.remote()(MEDIA[:2, None], PROMPTS[:2], METADATA[:2]).tolist() == NUMBERS[:2]  # of one frame


def test_a_groupwise_reward_gets_whole_groups(server: Server):
    groups = torch.tensor([7, 7, 7, 2, 2, 9, 9, 9, 9, 1, 1])
    remote = server.remote(part="members", groupwise=True, batch_size=2)
    remote.self_check()
    assert remote(MEDIA, PROMPTS, METADATA, groups).tolist() == [3, 3, 3, 2, 2, 4, 4, 4, 4, 2, 2]


def test_not_a_number_comes_back_as_nan(server: Server):
    found = server.remote(on_failure="stop")(MEDIA, ["nan", *PROMPTS[1:]], METADATA)
    assert found.isnan().tolist() == [True] + [False] * 10


def test_a_list_of_scores_serves_as_it_does_here(server: Server):
    assert server.remote(on_failure="stop")(MEDIA, ["list"] * 11, METADATA).tolist() == NUMBERS


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("raise", "RuntimeError: this prompt cannot be scored"),
        ("out of memory", "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_reward_that_fails_says_why_and_serves_on(server: Server, prompt: str, reason: str):
    with pytest.raises(RewardError, match=f"11 of 11 samples could not be scored: .*answered 500: .*{reason}"):
        server.remote(on_failure="stop")(MEDIA, [prompt] * 11, METADATA)
    assert server.remote()(MEDIA, PROMPTS, METADATA).tolist() == NUMBERS


def test_a_token_may_have_any_characters(monkeypatch: pytest.MonkeyPatch):
    """The client sends UTF-8, and the server sees each byte as a character."""
    from starlette.requests import Request

    from flowalign.rewards.transport import Patience, Replica
    from flowalign.serving.app import RefusalError, _authenticate

    monkeypatch.setenv("A_TOKEN", "geheim ü €")
    client = Replica("http://localhost:1", Patience(), "A_TOKEN")._get_client()
    request = Request({"type": "http", "headers": client.headers.raw})
    _authenticate(request, "geheim ü €")
    with pytest.raises(RefusalError):
        _authenticate(request, "geheim")


def test_a_wrong_token_is_refused_before_training(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLOWALIGN_REWARD_TOKEN", "another")
    with pytest.raises(RewardError, match="answered 401: .*token is missing or wrong.*FLOWALIGN_REWARD_TOKEN"):
        server.remote().self_check()
    assert server.remote()(MEDIA, PROMPTS, METADATA).isnan().all()


def bomb() -> bytes:
    """Few bytes that would become many pixels."""
    file = BytesIO()
    Image.new("RGB", (1001, 1000)).save(file, "PNG")
    return Query("request", "reward", False, [Sample([file.getvalue()], "", {})], 30).dump()


MALFORMED: list[tuple[Any, str]] = [
    (b"\x80\x04\x95pickle", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    ([], "no `protocol`"),
    (body(MEDIA[:1], protocol=99), "protocol 99"),
    (body(MEDIA[:1], part="beauty"), "'beauty' is not served here, but members, reward"),
    (body(MEDIA[:1], part="members"), "every sample needs its `group`"),
    (body(MEDIA[:1], samples=[]), "0 samples"),
    (body(MEDIA[:9]), "9 samples in a request; 1 to 8 are accepted"),
    (body(MEDIA[:1], video="yes"), "`video` must be a bool"),
    (body(MEDIA[None, :2], video=True) | {"video": False}, "an image is one frame"),
    (body(MEDIA[:1], patience="for ever"), "patience must be a finite number"),
    (bomb(), "1001000 pixels exceed the limit of 1000000"),
]


@pytest.mark.parametrize(("asked", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_what_makes_no_sense_is_refused_with_the_reason(server: Server, asked: Any, reason: str):
    answer = server.post(asked if isinstance(asked, bytes) else json.dumps(asked).encode())
    assert answer.status_code == 422
    assert reason in answer.json()["error"]


def test_a_sample_that_changed_on_its_way_is_refused(server: Server):
    for change in ({"prompt": "another"}, {"metadata": {"a": 1}}, {"group": 1}):
        asked = body(MEDIA[:2])
        asked["samples"][1] |= change
        assert "sample 1 does not match its id" in server.post(json.dumps(asked).encode()).json()["error"]
    asked = body(MEDIA[:2])
    first, second = asked["samples"]
    first["frames"], second["frames"] = second["frames"], first["frames"]
    assert "sample 0 does not match its id" in server.post(json.dumps(asked).encode()).json()["error"]


@pytest.mark.parametrize("file", [b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40], ids=["text", "broken"])
def test_what_is_no_png_is_refused(server: Server, file: bytes):
    query = Query("request", "reward", False, [Sample([file], "", {})], 30)
    answer = server.post(query.dump())
    assert (answer.status_code, "PNG" in answer.json()["error"]) == (422, True)


def test_too_many_bytes_are_refused_and_said_so(server: Server):
    with pytest.raises(RewardError, match="answered 413: .*more than 1048576 bytes; send fewer samples"):
        server.remote(on_failure="stop")(torch.rand(8, 3, 300, 300), PROMPTS[:8], METADATA[:8])


def test_a_full_server_says_when_to_come_back_and_answers_all_in_the_end(server: Server):
    slow = json.loads(Query("r", "reward", False, [Sample(encode(to_uint8(MEDIA[:1])), "", {"sleep": 1})], 30).dump())
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(server.post(json.dumps(slow).encode()))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * codes.count(200) + [503] * codes.count(503)
    assert codes.count(503) >= 1
    assert {answer.headers.get("retry-after") for answer in answers} == {None, "1"}
    patient = server.remote(in_flight=8, batch_size=1)
    assert patient(MEDIA, PROMPTS, [{"sleep": 0.05}] * 11).tolist() == NUMBERS


def test_its_health_says_what_it_serves(server: Server):
    health = server.health()
    assert (health["status"], health["reward"]) == ("ready", "marked")
    assert health["parts"]["members"] == {"class": "Members", "self_check": "none", "groupwise": True}
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 401


# ------------------------------------------------------------ starting and ending


@pytest.mark.slow
def test_asked_to_end_it_answers_first(tmp_path: Path, server: Server):
    ending, killed = (announced(launched(tmp_path)) for _ in range(2))
    ending.remote().self_check()
    found: list[torch.Tensor] = []
    slow = [{"sleep": 5}] + METADATA[1:8]
    asking = threading.Thread(target=lambda: found.append(ending.remote()(MEDIA[:8], PROMPTS[:8], slow)))
    asking.start()
    while asking.is_alive() and not ending.health()["busy_s"]:
        time.sleep(0.1)
    ending.process.send_signal(signal.SIGTERM)
    asking.join()
    assert found[0].tolist() == NUMBERS[:8]
    assert "Traceback" not in ending.process.communicate(timeout=20)[1]

    killed.remote().self_check()
    both = Remote([killed.url, server.url], batch_size=1, patience=Patience(retries=2, backoff=0.01, total=60))
    kill = threading.Timer(0.5, killed.process.kill)
    kill.start()
    assert both(MEDIA, PROMPTS, [{"sleep": 0.2}] * 11).tolist() == NUMBERS  # served by the other one
    killed.process.communicate()


def refused(*words: str) -> str:
    command = [sys.executable, "-m", "flowalign.cli", "reward-server", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_mistake_ends_it_with_a_sentence(say: Any, monkeypatch: pytest.MonkeyPatch):
    from flowalign.cli import main

    monkeypatch.delenv("FLOWALIGN_REWARD_TOKEN", raising=False)
    for words, hint in (
        ((), "needs reward=…"),
        (("reward=jpg",), "no reward called jpg; did you mean jpeg?"),
        (("reward=jpeg", "prot=1"), "did you mean port=…?"),
        (("reward=jpeg", "reward.objective.qualty=3"), "did you mean reward.objective.quality?"),
        (("reward=jpeg", "reward.objective.quality=good"), "expected an integer"),
        (("reward=jpeg", "only=beauty"), "there is no beauty; the rewards are reward."),
        (("reward=jpeg", "host=0.0.0.0"), "set FLOWALIGN_REWARD_TOKEN to a secret, or say open=true"),
        (("reward=jpeg", "places=0"), "at least 1"),
        (("reward=jpeg", "port=99999"), "use 1 to 65535"),
        (("reward=jpeg", "host=192.0.2.1", "open=true"), "cannot be listened on"),
    ):
        code, _, said = say(main, "reward-server", *words)
        assert code == 2, words
        assert hint in said, said


def test_it_runs_where_nothing_of_the_training_is_installed():
    heavy = {"lightning", "diffusers", "transformers", "peft", "torchmetrics", "tensorboard", "scipy"}
    program = f"""
import sys, flowalign.cli, flowalign.serving.app, flowalign.rewards.remote
print(sorted({heavy} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_reward_that_cannot_be_made_ends_it_with_the_reason():
    assert "reward=jpeg cannot be served: " in refused("reward=jpeg", "port=0", "reward.objective.quality=100")


def test_a_self_check_that_fails_ends_it_unless_it_is_switched_off(tmp_path: Path):
    (tmp_path / "reward").mkdir()
    option = "{ _target_: flowalign.scoring.Scorer, objective: { _target_: tests.rewards.toys.Light, folder: broken } }"
    (tmp_path / "reward/broken.yaml").write_text(option)
    words = ("reward=broken", f"config_dir={tmp_path}")
    assert "it is broken" in refused(*words, "port=0")
    served = announced(command(*words, "reward.self_check=false"))
    try:
        served.remote().self_check()  # waits until it is ready
        assert served.health()["parts"]["reward"]["self_check"] == "skipped"
    finally:
        served.process.kill()
        served.process.communicate()


STAND_IN = """
from imageio_ffmpeg import count_frames_and_secs
class VideoVLMRewardInference:
    def __init__(self, checkpoint, device): ...
    def reward(self, paths, prompts, use_norm):
        return [{"Overall": count_frames_and_secs(path)[0] + len(prompt)} for path, prompt in zip(paths, prompts)]
"""


@pytest.mark.slow
def test_the_video_reward_of_the_documentation_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (ROOT / "docs/rewards/remote.md").read_text()
    for name, text in re.findall(r"```(?:python|yaml)\n# (my_\S+)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "inference.py").write_text(STAND_IN)
    monkeypatch.setenv("FLOWALIGN_REWARD_TOKEN", SECRET)
    words = ("reward=videoalign", f"config_dir={tmp_path / 'my_conf'}", "+reward.objective.device=cpu")
    served = announced(command(*words, path=tmp_path))
    try:
        remote = served.remote(batch_size=2)
        remote.self_check()
        assert remote(torch.rand(3, 5, 3, 32, 32), ["", "a", "bc"], [{}] * 3).tolist() == [5, 6, 7]
    finally:
        served.process.kill()
        served.process.communicate()
