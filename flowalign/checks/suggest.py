"""Did-you-mean suggestions."""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 12  # nobody reads a longer list


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` most resembles, or None."""
    plain = {_plain(choice): choice for choice in choices}
    word = _plain(word)
    if word in plain:
        return plain[word]
    starts = sorted(choice for choice in plain if len(word) > 1 and choice.startswith(word))
    close = get_close_matches(word, plain, n=1, cutoff=0.6) or starts
    return plain[close[0]] if close else None


def suggest(word: str, choices: Iterable[str]) -> str:
    """The second half of an error message: 'did you mean nft?', or the list of choices."""
    choices = sorted(set(choices))
    close = nearest(word, choices)
    return f"did you mean {close}?" if close else listing(choices)


def listing(choices: Iterable[str]) -> str:
    """'available: a, b, c', truncated after SHOWN."""
    choices = sorted(set(choices))
    if not choices:
        return "there is nothing to choose from"
    return "available: " + ", ".join(choices[:SHOWN]) + (", …" if len(choices) > SHOWN else "")


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
