"""Each distinct prompt is encoded once, or as often as it has left memory, and always to the same bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowalign.conditioner import Conditioner, Encoding
from flowalign.embeddings import Embeddings
from flowalign.prompts import Prompt
from flowalign.run import build_recipe
from flowalign.types import Conditioning

if TYPE_CHECKING:
    from omegaconf import DictConfig

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


# ------------------------------------------------------------ the same bits


def test_a_row_does_not_tell_whether_autocast_was_on(tiny: Callable[..., DictConfig]):
    rows = []
    for on in (False, True):
        condition = Conditioner(build_recipe(tiny()).model, guided=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            rows.append(condition([Prompt("a red circle")], CPU, SIZE))
    assert equal(*rows)


def test_a_row_that_has_left_memory_comes_back_the_same(tiny: Callable[..., DictConfig]):
    condition = Conditioner(build_recipe(tiny()).model, True, Encoding(keep_gib=0))
    red, blue = Prompt("a red circle"), Prompt("a blue square")
    together = condition([red, blue], CPU, SIZE)
    for row, prompt in enumerate((red, blue)):
        assert equal(condition([prompt], CPU, SIZE), together.index(slice(row, row + 1)))


def equal(one: Conditioning, other: Conditioning) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


# ------------------------------------------------------------ in memory


def test_the_longest_unused_row_leaves_memory_first():
    condition, encoder = conditioner(keep_gib=2 * 4 * 4 / 2**30)  # two rows of four letters in float32
    for text in ("grey", "blue", "grey", "pink"):
        condition([Prompt(text)], CPU, SIZE)
    assert encoder.asked == ["grey", "blue", "pink"]
    condition([Prompt("pink"), Prompt("grey")], CPU, SIZE)
    assert encoder.asked == ["grey", "blue", "pink"]
    assert words(condition([Prompt("blue")], CPU, SIZE)) == ["blue"]
    assert encoder.asked == ["grey", "blue", "pink", "blue"]


def test_what_is_asked_at_once_stays_together_until_others_are_asked_for():
    condition, encoder = conditioner(keep_gib=0)
    texts = ["grey", "blue", "pink"]
    condition.prepare([Prompt(text) for text in texts], SIZE)
    for _ in range(2):
        assert words(condition([Prompt(text) for text in texts], CPU, SIZE)) == texts
    assert encoder.asked == texts
    condition.prepare([Prompt("red")], SIZE)
    condition.prepare([Prompt("grey")], SIZE)
    assert encoder.asked == [*texts, "red", "grey"]


@pytest.mark.parametrize("cached", [False, True])
def test_no_row_is_lost_once_the_encoders_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool):
    cache = str(tmp_path) if cached else None
    condition, encoder = conditioner(keep_gib=0, release=True, cache=cache)
    texts = ["grey", "blue", "pink"]
    condition.prepare_all([Prompt(text) for text in texts], SIZE)
    monkeypatch.setattr(encoder, "encode", None)
    assert [words(condition([Prompt(text)], CPU, SIZE)) for text in texts] == [[text] for text in texts]


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
    assert "is encoded again" in caplog.text
    healed, nobody = conditioner(cache=str(tmp_path))
    healed.prepare(prompts, SIZE)
    assert nobody.asked == []
    assert not list(tmp_path.glob("*/*/.*"))  # nothing half written


def test_progress_counts_distinct_prompts(tmp_path: Path):
    condition, _ = conditioner(batch_size=2, cache=str(tmp_path))
    condition.prepare([Prompt("red")], SIZE)
    seen: list[int] = []
    condition.prepare_all([Prompt(c) for c in ("red", "blue", "blue", "green", "grey")], SIZE, seen.append)
    assert seen == [2, 4]


def test_rows_of_another_way_of_encoding_are_not_used(tmp_path: Path):
    condition, encoder = conditioner(cache=str(tmp_path))
    Embeddings(tmp_path, encoder.text_fingerprint()).write(("red",), Conditioning({"tokens": torch.zeros(1, 3)}))
    assert words(condition([Prompt("red")], CPU, SIZE)) == ["red"]


def test_two_processes_of_one_number_may_write_a_prompt_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As ranks in containers do."""
    cache, row, replace = Embeddings(tmp_path, "encoder"), Conditioning({"tokens": torch.ones(1, 2)}), os.replace

    def overtaken(*names: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        cache.write(("red",), row)
        replace(*names)

    monkeypatch.setattr(os, "replace", overtaken)
    cache.write(("red",), row)
    read = cache.read(("red",))
    assert read is not None
    assert equal(read, row)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*names: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        Embeddings(tmp_path, "encoder").write(("red",), Conditioning({"tokens": torch.ones(1, 2)}))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_the_ranks_have_divided_none_has_to_make_again(tmp_path: Path):
    prompts = [Prompt(f"prompt {i}") for i in range(5)]
    ranks = [conditioner(cache=str(tmp_path), keep_gib=0) for _ in range(2)]
    for rank, (condition, _) in enumerate(ranks):
        condition.prepare_all(prompts[rank::2], SIZE)
    for rank, (condition, encoder) in enumerate(ranks):
        assert condition.missing(prompts, SIZE) == []
        assert words(condition(prompts, CPU, SIZE)) == texts_of(prompts)
        assert encoder.asked == texts_of(prompts[rank::2])
    elsewhere, _ = conditioner(cache=str(tmp_path / "of another machine"), keep_gib=0)
    elsewhere.prepare_all(prompts[0::2], SIZE)
    assert elsewhere.missing(prompts, SIZE) == prompts[1::2]


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    return [p.text for p in prompts]
