"""A CLIP tokenizer for the scenes world: each of its words is one token, and any other text is split into bytes.

Library trainers break ties by hash order, so ids differ between processes; this one breaks them by spelling.
"""

from __future__ import annotations

from collections import Counter

from transformers import CLIPTokenizer

from flowalign.shapes.world import KINDS, specs

MAX_LENGTH = 16  # tokens, start and end included; the longest caption has 13 words
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """Every word of every caption, sorted."""
    return sorted(
        {word for kind in KINDS for spec in specs(kind) for caption in spec.captions() for word in caption.split()}
    )


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b if b in printable else next(spare)) for b in range(256)]


def merges(lexicon: list[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges, most frequent pair first and ties by spelling, until every word is one token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in lexicon]
    learnt: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelled for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        spelled = [_merge(word, best) for word in spelled]
    return learnt


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build() -> CLIPTokenizer:
    """Build the tokenizer, which is the same in every process."""
    alphabet, learnt = _byte_alphabet(), merges(words())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in learnt), START, END]
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(dict.fromkeys(tokens))}, merges=learnt, model_max_length=MAX_LENGTH
    )
