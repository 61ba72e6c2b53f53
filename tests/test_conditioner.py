"""Each distinct prompt is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign.conditioner import Conditioner, Encoding
from flowalign.prompts import Prompt
from flowalign.types import Conditioning

CPU, SIZE = torch.device("cpu"), (32, 32, None)


class Encoder:
    """Remembers what it was asked; a prompt's row is as long as its text."""

    sees_images = False
    device = CPU

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.negatives: list[str] | None = None
        self.largest = 0
        self.name = "first"

    def text_fingerprint(self) -> str:
        return self.name

    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        self.asked += prompts
        self.negatives = None if negatives is None else [*(self.negatives or []), *negatives]
        self.largest = max(self.largest, len(prompts))
        longest = max(len(p) for p in prompts)
        rows = [torch.tensor([ord(c) for c in p] + [0] * (longest - len(p))) for p in prompts]
        return Conditioning({"tokens": torch.stack(rows).float()})


def words(cond: Conditioning) -> list[str]:
    return ["".join(chr(int(c)) for c in row if c) for row in cond["tokens"]]


def conditioner(guided: bool = False, **settings: Any) -> tuple[Conditioner, Encoder]:
    encoder = Encoder()
    return Conditioner(encoder, guided, Encoding(**settings)), encoder  # type: ignore[arg-type]


def test_every_distinct_prompt_is_encoded_once():
    condition, encoder = conditioner()
    prompts = [Prompt("red"), Prompt("blue"), Prompt("red")]
    assert words(condition(prompts, CPU, SIZE)) == ["red", "blue", "red"]
    assert words(condition([Prompt("green"), Prompt("blue")], CPU, SIZE)) == ["green", "blue"]
    assert encoder.asked == ["red", "blue", "green"]


def test_the_negative_prompt_is_encoded_only_for_guidance_and_tells_prompts_apart():
    condition, encoder = conditioner(guided=False)
    condition([Prompt("red", "blurry")], CPU, SIZE)
    assert encoder.negatives is None
    condition, encoder = conditioner(guided=True)
    condition([Prompt("red", "blurry"), Prompt("red"), Prompt("red", "blurry")], CPU, SIZE)
    assert encoder.negatives == ["blurry", ""]


def test_encoding_goes_in_batches():
    condition, encoder = conditioner(batch_size=3)
    texts = [f"prompt {i}" for i in range(8)]
    assert words(condition([Prompt(t) for t in texts], CPU, SIZE)) == texts
    assert encoder.largest == 3


# ------------------------------------------------------------ on disk


def test_a_second_run_finds_what_the_first_one_encoded(tmp_path: Path):
    prompts = [Prompt("red", "blurry"), Prompt("blue")]
    first, encoder = conditioner(guided=True, cache=str(tmp_path))
    made = first(prompts, CPU, SIZE)
    second, other = conditioner(guided=True, cache=str(tmp_path))
    found = second(prompts, CPU, SIZE)
    assert encoder.asked == ["red", "blue"]
    assert other.asked == []
    assert torch.equal(made["tokens"], found["tokens"])
    unguided, _ = conditioner(guided=False, cache=str(tmp_path))
    assert words(unguided(prompts, CPU, SIZE)) == ["red", "blue"]  # its rows are others, without a negative


def test_another_encoder_has_files_of_its_own(tmp_path: Path):
    conditioner(cache=str(tmp_path))[0].prepare([Prompt("red")], SIZE)
    encoder = Encoder()
    encoder.name = "second"
    Conditioner(encoder, False, Encoding(str(tmp_path))).prepare([Prompt("red")], SIZE)  # type: ignore[arg-type]
    assert encoder.asked == ["red"]
    assert len(list(tmp_path.glob("*/*/*.safetensors"))) == 2


def _torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _exchanged(file: Path) -> None:
    other = next(f for f in file.parents[1].glob("*/*.safetensors") if f != file)
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [_torn, _emptied, _changed, _exchanged])
def test_what_is_damaged_is_noticed_and_made_again(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture):
    prompts = [Prompt("red"), Prompt("blue")]
    conditioner(cache=str(tmp_path))[0].prepare(prompts, SIZE)
    damage(sorted(tmp_path.glob("*/*/*.safetensors"))[0])
    again, encoder = conditioner(cache=str(tmp_path))
    assert words(again(prompts, CPU, SIZE)) == ["red", "blue"]
    assert len(encoder.asked) == 1
    assert "is made again" in caplog.text
    healed, nobody = conditioner(cache=str(tmp_path))
    healed.prepare(prompts, SIZE)
    assert nobody.asked == []
    assert not list(tmp_path.glob("*/*/.*"))  # nothing half written


def test_progress_counts_distinct_prompts(tmp_path: Path):
    condition, _ = conditioner(batch_size=2, cache=str(tmp_path))
    condition.prepare([Prompt("red")], SIZE)
    seen: list[int] = []
    condition.prepare([Prompt(c) for c in ("red", "blue", "blue", "green", "grey")], SIZE, seen.append)
    assert seen == [3, 4]
