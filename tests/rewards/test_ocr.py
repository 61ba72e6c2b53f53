"""Written text as a reward, by the real engines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from flowalign.rewards.base import RewardError
from flowalign.rewards.drawings import noise, render_text
from flowalign.rewards.ocr import OCR, edit_distance, wanted_text
from flowalign.rewards.readers import READERS
from tests.conftest import ROOT

ENGINES = [
    "rapidocr",
    pytest.param(
        "tesseract", marks=pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
    ),
]


@pytest.fixture(scope="module")
def engines() -> dict[str, OCR]:
    return {}


@pytest.fixture(params=ENGINES)
def ocr(request: pytest.FixtureRequest, engines: dict[str, OCR]) -> OCR:
    """One of the engines, loaded once."""
    return engines.setdefault(request.param, OCR(request.param))


def score(reward: OCR, picture: torch.Tensor, text: str) -> float:
    return reward(picture[None], ["a sign"], [{"text": text}]).item()


def test_a_legible_text_scores_one_and_noise_nothing(ocr: OCR):
    assert score(ocr, render_text("GARDEN"), "garden") == 1
    assert score(ocr, noise(), "garden") == 0
    ocr.self_check()


def test_every_wrong_letter_costs_its_share(ocr: OCR):
    assert score(ocr, render_text("WARDEN"), "garden") == pytest.approx(5 / 6)


def test_a_score_depends_on_its_own_picture_only_and_nan_stays_apart(ocr: OCR):
    pictures = torch.stack([render_text("GARDEN"), render_text("MARKET"), render_text("GARDEN")])
    pictures[2, 0, 0, 0] = torch.nan
    scores = ocr(pictures, ['a sign "garden"'] * 3, [{}] * 3)
    assert scores[0] == 1
    assert scores[1] == score(ocr, render_text("MARKET"), "garden") < 0.6
    assert scores[2].isnan()


class Says:
    """An engine that reads what it is told to, surely or not."""

    def __init__(self, *pieces: tuple[str, float]) -> None:
        self.pieces = list(pieces)

    def __call__(self, picture: Any) -> list[tuple[str, float]]:
        return self.pieces


@pytest.mark.parametrize(
    ("pieces", "settings", "expected"),
    [
        ([("Hello", 0.9), ("WORLD", 0.9)], {}, 1),
        ([("xx hello", 0.9), ("world yy", 0.9)], {}, 1),  # the text stands whole
        ([("xx hello", 0.9), ("world yy", 0.9)], {"alone": True}, 0.6),  # four letters too many, of ten
        ([("help", 0.9), ("world", 0.9)], {}, 0.8),
        ([("a text that is very much longer than it should be", 0.9)], {}, 0),  # never below nothing
        ([], {}, 0),
        ([("hello", 0.9), ("world", 0.2)], {}, 1),
        ([("hello", 0.9), ("world", 0.2)], {"min_confidence": 0.5}, 0.5),
    ],
)
def test_the_reward_by_hand(pieces: list[tuple[str, float]], settings: dict[str, Any], expected: float):
    reward = OCR(**settings)
    reward.reader = Says(*pieces)
    assert score(reward, noise(), "hello world") == pytest.approx(expected)


def test_edit_distance_by_hand():
    assert [edit_distance(a, b) for a, b in (("", "abc"), ("kitten", "sitting"), ("flaw", "lawn"), ("x", "x"))] == [
        3,
        3,
        2,
        0,
    ]


def test_the_text_is_what_the_line_says_or_what_stands_in_quotes():
    assert wanted_text('a "Blue Door" and "x"', {}) == "bluedoor"
    assert wanted_text("a sign “Open”", {}) == "open"
    assert wanted_text('a "Blue Door"', {"text": "Red"}) == "red"
    for prompt, entry in (("a door", {}), ('a ""', {}), ('a "door"', {"text": " "}), ("a", {"text": 3})):
        with pytest.raises(ValueError, match="put it into double quotes"):
            wanted_text(prompt, entry)
        with pytest.raises(ValueError, match="put it into double quotes"):
            OCR().check_prompt(prompt, entry)


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [("rapidocr", r"pip install 'flowalign\[ocr\]'"), ("tesseract", "apt install tesseract-ocr")],
)
def test_a_missing_engine_is_one_sentence(engine: str, sentence: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowalign.rewards.readers.find_spec", lambda name: None)
    monkeypatch.setattr("flowalign.rewards.readers.shutil.which", lambda name: None)
    with pytest.raises(RewardError, match=sentence):
        OCR(engine).self_check()  # type: ignore[arg-type]


def test_an_engine_that_reads_nothing_fails_its_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(READERS, "rapidocr", Says)
    with pytest.raises(RewardError, match="does not rank GARDEN, CARBON and noise .* 0, 0, 0"):
        OCR().self_check()


@pytest.mark.parametrize(
    ("settings", "sentence"), [({"engine": "eye"}, "one of"), ({"min_confidence": 2}, r"in \[0, 1\]")]
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        OCR(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_clean_words_rank_above_damaged_ones_and_those_above_others(engine: str):
    command = [sys.executable, "bench/ocr_ranking.py", "--engine", engine, "--words", "30"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=280)
    figures = json.loads(done.stdout)
    assert figures["words"] == 30
    assert round(30 * figures["ranked"]) >= {"rapidocr": 29, "tesseract": 27}[engine]  # of 200, 94 % by tesseract
