import os
import subprocess
import sys

import pytest

from flowalign.shapes import tokenizer
from flowalign.shapes.world import KINDS, specs

PROGRAM = """
import hashlib
from flowalign.shapes import tokenizer
from flowalign.shapes.world import KINDS, specs
tok = tokenizer.build()
texts = [c for k in KINDS for s in specs(k)[::37] for c in s.captions()] + ["a mauve dodecahedron, naïvely"]
print(hashlib.sha256(repr((sorted(tok.get_vocab().items()), tok(texts)["input_ids"])).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tok():
    return tokenizer.build()


def test_another_process_with_another_hash_seed_gives_the_same_ids():
    def digest(seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True
        ).stdout

    first = digest("1")
    assert len(first.strip()) == 64
    assert first == digest("31337")


def test_every_word_of_the_world_is_one_token(tok):
    for word in tokenizer.words():
        start, *ids, end = tok(word)["input_ids"]
        assert (start, end) == (tok.bos_token_id, tok.eos_token_id)
        assert len(ids) == 1


@pytest.mark.parametrize("text", ["mauve", "dodecahedron", "naïve", "红色", "blue-green?"])
def test_unknown_text_survives_as_bytes(tok, text):
    ids = tok(text)["input_ids"][1:-1]
    assert tok.unk_token_id not in ids[:-1] or tok.unk_token_id != tok.eos_token_id
    assert tok.decode(ids, skip_special_tokens=True).replace(" ", "") == text


def test_the_longest_caption_fits(tok):
    texts = [caption for kind in KINDS for spec in specs(kind) for caption in spec.captions()]
    assert max(len(ids) for ids in tok(texts)["input_ids"]) <= tokenizer.MAX_LENGTH == tok.model_max_length


def test_different_captions_have_different_ids(tok):
    texts = [caption for kind in KINDS for spec in specs(kind) for caption in spec.captions()]
    assert len({tuple(ids) for ids in tok(texts)["input_ids"]}) == len(texts)
