"""Each distinct prompt is encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowalign.conditioner import Conditioner
from flowalign.prompts import Prompt
from flowalign.types import Conditioning


class Encoder:
    """Remembers what it was asked; a prompt's row is as long as its text."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.negatives: list[str] | None = None
        self.largest = 0

    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        self.asked += prompts
        self.negatives = None if negatives is None else [*(self.negatives or []), *negatives]
        self.largest = max(self.largest, len(prompts))
        longest = max(len(p) for p in prompts)
        rows = [torch.tensor([ord(c) for c in p] + [0] * (longest - len(p))) for p in prompts]
        return Conditioning({"tokens": torch.stack(rows).float()})


def words(cond: Conditioning) -> list[str]:
    return ["".join(chr(int(c)) for c in row if c) for row in cond["tokens"]]


def conditioner(guided: bool = False, batch_size: int = 64) -> tuple[Conditioner, Encoder]:
    encoder = Encoder()
    return Conditioner(encoder, guided, batch_size), encoder  # type: ignore[arg-type]


def test_every_distinct_prompt_is_encoded_once():
    condition, encoder = conditioner()
    prompts = [Prompt("red"), Prompt("blue"), Prompt("red")]
    assert words(condition(prompts, torch.device("cpu"))) == ["red", "blue", "red"]
    assert words(condition([Prompt("green"), Prompt("blue")], torch.device("cpu"))) == ["green", "blue"]
    assert encoder.asked == ["red", "blue", "green"]


def test_the_negative_prompt_is_encoded_only_for_guidance_and_tells_prompts_apart():
    condition, encoder = conditioner(guided=False)
    condition([Prompt("red", "blurry")], torch.device("cpu"))
    assert encoder.negatives is None
    condition, encoder = conditioner(guided=True)
    condition([Prompt("red", "blurry"), Prompt("red"), Prompt("red", "blurry")], torch.device("cpu"))
    assert encoder.negatives == ["blurry", ""]


def test_encoding_goes_in_batches():
    condition, encoder = conditioner(batch_size=3)
    texts = [f"prompt {i}" for i in range(8)]
    assert words(condition([Prompt(t) for t in texts], torch.device("cpu"))) == texts
    assert encoder.largest == 3
