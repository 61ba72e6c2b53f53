"""Hundreds of wrong command lines for the real configs: each is refused by one sentence that names what is near."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowalign.checks import ConfigError
from flowalign.checks.preflight import preflight
from flowalign.run import check
from tests.checks.mistakes import CONF, Mistake, mistakes

NUMBER, QUICK, REAL = 306, 18, 4
"""All; those that are tried always; and those that are typed into a shell."""


@pytest.fixture(scope="module")
def every() -> list[Mistake]:
    return mistakes(seed=0, number=NUMBER)


def unhelpful(mistake: Mistake) -> str:
    """What is wrong with the answer to a mistake; nothing if it is a sentence that names one of `near`."""
    line = " ".join(mistake.words)
    try:
        preflight(mistake.words, CONF, "train", check)
    except ConfigError as refusal:
        said = str(refusal)
        if "\n" in said or "Traceback" in said:
            return f"{line}: not one sentence: {said}"
        named = not mistake.near or any(word in said for word in mistake.near)
        return "" if named else f"{line}: none of {mistake.near[:4]} in: {said}"
    return f"{line}: was accepted"


def test_every_sort_of_mistake_is_told_in_a_sentence(every: list[Mistake]):
    assert [answer for mistake in every[:QUICK] if (answer := unhelpful(mistake))] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hundreds_of_mistakes_are_told_in_a_sentence(every: list[Mistake]):
    assert len({mistake.words for mistake in every}) == NUMBER
    assert [answer for mistake in every if (answer := unhelpful(mistake))] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(REAL))
def test_a_mistake_in_a_shell_ends_with_code_2_and_a_line(every: list[Mistake], number: int):
    words = every[-1 - number].words
    done = subprocess.run([sys.executable, "train.py", *words], cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_what_is_asked_of_hydra_twice_is_refused():
    with pytest.raises(ConfigError, match="--multirun and --cfg cannot be asked for together"):
        preflight(["-m", "--cfg", "job"], CONF, "train")


def test_the_mistakes_are_mistakes(every: list[Mistake]):
    """They are made of the configs: of several sections, of every sort, and the same for the same seed."""
    assert Path(CONF, "train.yaml").is_file()
    assert len({word.partition(".")[0] for mistake in every for word in mistake.words}) > 60
    assert [m.words for m in mistakes(seed=0, number=12)] == [m.words for m in every[:12]]
