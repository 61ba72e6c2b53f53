"""Did-you-mean."""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 12  # a longer list is not read


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was probably meant to be, or None where none resembles it."""
    plain = {_plain(choice): choice for choice in choices}
    word = _plain(word)
    if word in plain:
        return plain[word]
    starts = sorted(choice for choice in plain if len(word) > 1 and choice.startswith(word))
    close = get_close_matches(word, plain, n=1, cutoff=0.6) or starts
    return plain[close[0]] if close else None


def suggest(word: str, choices: Iterable[str]) -> str:
    """The second half of a refusal: 'did you mean nft?', or the list of what there is."""
    choices = sorted(set(choices))
    close = nearest(word, choices)
    return f"did you mean {close}?" if close else listing(choices)


def listing(choices: Iterable[str]) -> str:
    """'available: a, b, c', cut where it gets long."""
    choices = sorted(set(choices))
    if not choices:
        return "there is nothing to choose from"
    return "available: " + ", ".join(choices[:SHOWN]) + (", …" if len(choices) > SHOWN else "")


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
