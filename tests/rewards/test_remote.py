"""The client against a real process that fails in every way: no fault is ever a score."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from flowalign.rewards.base import RewardError
from flowalign.rewards.dispatch import BusyError
from flowalign.rewards.remote import Remote
from flowalign.rewards.transport import Patience, Replica
from tests.conftest import ROOT

MEDIA = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEANS = ((MEDIA * 255).round() / 255).flatten(1).mean(dim=1)
PROMPTS, METADATA = [f"picture {i}" for i in range(5)], [{"tag": i} for i in range(5)]
SHORT = Patience(connect=1, read=1, total=20, retries=1, backoff=0.02, longest=0.1, start=20)
BRIEF = Patience(connect=1, read=0.4, total=1.5, retries=1, backoff=0.02, longest=0.1)
"""Where nothing good is to be expected."""


def started() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(ROOT / "bench/faulty_reward.py")], stdout=subprocess.PIPE, text=True)


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return f"http://127.0.0.1:{int(process.stdout.readline())}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    process = started()
    yield address(process)
    process.kill()
    process.wait()


@pytest.fixture
def mortal() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server of a test's own."""
    process = started()
    yield address(process), process
    process.kill()
    process.wait()


@pytest.fixture
def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def scores(*urls: str, patience: Patience = SHORT, **settings: object) -> torch.Tensor:
    remote = Remote(list(urls), batch_size=2, patience=patience, **settings)  # type: ignore[arg-type]
    try:
        return remote(MEDIA, PROMPTS, METADATA)
    finally:
        remote.close()


PERMANENT = (
    *("hangs", "trickles", "hangs_up", "cut_off", "garbage", "error_500", "out_of_memory", "unauthorised", "too_large"),
    *("busy", "moved", "wrong_id", "missing", "twice", "too_many", "other_request", "no_score", "text", "true", "list"),
    *("nan_literal", "infinite", "beyond_float32", "not_an_object"),
)


def test_a_server_that_is_well_scores_every_picture(server: str):
    assert torch.allclose(scores(f"{server}/none"), MEANS)


@pytest.mark.parametrize("fault", PERMANENT)
def test_no_fault_is_a_score(server: str, fault: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert scores(f"{server}/{fault}", patience=BRIEF).isnan().all()
    assert "5 of 5 samples could not be scored: " in caplog.text


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_replica_that_is_well_makes_up_for_one_that_is_not(server: str, fault: str):
    alone = "too_large"  # is the request's own fault, and nobody else is asked
    found = scores(f"{server}/{fault}", f"{server}/none")
    assert torch.allclose(found, MEANS) or (fault == alone and found.isnan().any())
    assert torch.equal(found.nan_to_num(0) != 0, ~found.isnan())  # a picture's mean is never 0


@pytest.mark.parametrize("fault", ["error_500", "wrong_id", "hangs", "too_large"])
def test_a_run_that_wants_to_stop_is_told_why(server: str, fault: str):
    with pytest.raises(RewardError, match="5 of 5 samples could not be scored: "):
        scores(f"{server}/{fault}", on_failure="stop", patience=BRIEF)


def test_what_the_server_cannot_score_is_nan_and_no_failure(server: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert scores(f"{server}/null", on_failure="stop").isnan().all()
    assert not caplog.text


def test_only_what_was_under_way_is_lost_when_the_server_breaks(server: str):
    found = scores(f"{server}/garbage/2", in_flight=1)
    assert torch.allclose(found[:4], MEANS[:4])
    assert found[4].isnan()


def test_nobody_there_is_nan_after_a_few_tries(nobody: str, server: str):
    assert scores(nobody).isnan().all()
    assert torch.allclose(scores(nobody, f"{server}/none"), MEANS)


def test_a_server_that_dies_in_the_middle_loses_nothing_if_another_lives(
    server: str, mortal: tuple[str, subprocess.Popen[str]]
):
    url, process = mortal
    assert torch.allclose(scores(f"{url}/dies/1", f"{server}/none"), MEANS)
    assert scores(f"{url}/dies").isnan().all()
    assert process.wait(5) == 9


def test_a_call_ends_when_its_time_is_over_whatever_the_other_limits(server: str):
    long = Patience(connect=60, read=60, total=0.5, retries=99, backoff=0.01)
    began = time.monotonic()
    assert scores(f"{server}/hangs", patience=long).isnan().all()
    assert scores(f"{server}/busy", patience=long).isnan().all()
    assert time.monotonic() - began < 30  # and not 60


def test_a_full_server_is_waited_for_and_not_given_up(mortal: tuple[str, subprocess.Popen[str]]):
    eager = Patience(read=2, total=20, retries=0, backoff=0.01)
    assert torch.allclose(scores(f"{mortal[0]}/slow_start", patience=eager), MEANS)


@pytest.mark.parametrize(("said", "seconds"), [("7", 7), ("", 0.5), ("-1", 0.5), ("Sun, 29 Nov 2026", 0.5), ("²", 0.5)])
def test_a_full_server_may_say_when_to_come_again(said: str, seconds: float):
    error = Replica("http://localhost", Patience(), "TOKEN")._error_for(503, b"", said)
    assert isinstance(error, BusyError)
    assert error.seconds == seconds


def test_a_reward_that_is_exchanged_under_the_run_is_refused(server: str):
    remote = Remote([f"{server}/other_reward/1"], batch_size=2, in_flight=1, patience=SHORT)
    found = remote(MEDIA, PROMPTS, METADATA)
    assert torch.allclose(found[:2], MEANS[:2])
    assert found[2:].isnan().all()


def test_broken_pictures_are_not_sent(server: str):
    media = MEDIA.clone()
    media[1, 0, 0, 0] = torch.nan
    found = Remote([f"{server}/none"], patience=SHORT)(media, PROMPTS, METADATA)
    assert found.isnan().tolist() == [False, True, False, False, False]
    assert torch.allclose(found[2:], MEANS[2:])


def test_metadata_that_json_cannot_say_are_a_mistake_and_no_missing_score(server: str):
    with pytest.raises(ValueError, match="metadata of 'picture 0' cannot be sent"):
        Remote([f"{server}/none"], patience=SHORT)(MEDIA, PROMPTS, [{"x": object()}, *METADATA[1:]])


# ------------------------------------------------------------ before training


def test_the_check_waits_for_a_server_that_is_still_starting(nobody: str):
    process = started()
    try:
        remote = Remote([nobody, f"{address(process)}/slow_start"], patience=SHORT)
        remote.self_check()
        assert torch.allclose(remote(MEDIA, PROMPTS, METADATA), MEANS)
    finally:
        process.kill()
        process.wait()


def test_who_waits_for_a_server_is_told_once_what_for(
    nobody: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("flowalign.rewards.transport.WARN_AFTER", 0.0)
    with caplog.at_level("WARNING", "flowalign"), pytest.raises(RewardError, match="within 1.2 s"):
        Remote([nobody], patience=Patience(connect=0.2, start=1.2)).self_check()
    assert len(caplog.messages) == 1
    assert "waiting up to 1.2 s for a reward server" in caplog.text


def test_the_check_says_what_is_wrong(nobody: str, server: str):
    impatient = Patience(connect=0.2, start=0.1)
    with pytest.raises(RewardError, match="no server was ready within 0.1 s: .*refused"):
        Remote([nobody], patience=impatient).self_check()
    with pytest.raises(RewardError, match="does not serve 'beauty', but reward"):
        Remote([f"{server}/none"], part="beauty", patience=SHORT).self_check()
    with pytest.raises(RewardError, match="say groupwise=false here too"):
        Remote([f"{server}/none"], groupwise=True, patience=SHORT).self_check()


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"urls": []}, "one or more servers"),
        ({"urls": ["http://a", "http://a"]}, "each once"),
        ({"urls": ["localhost:8000"]}, "form http://host:port"),
        ({"urls": ["http://a"], "batch_size": 0}, "batch_size"),
        ({"urls": ["http://a"], "in_flight": 0}, "in_flight"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, hint: str):
    with pytest.raises(ValueError, match=hint):
        Remote(**settings)


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ValueError, match="patience.read is a time"):
        Patience(read=0)
