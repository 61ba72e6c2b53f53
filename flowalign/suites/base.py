"""What a benchmark is, as far as `flowalign evaluate` needs to know it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowalign.prompts import Prompt, PromptSet

PROMPTS = Path("prompts")
"""Where the files of a suite are looked for, in a folder of its name, unless a command says otherwise."""


@dataclass(frozen=True)
class Suite:
    """Prompts with a category each (`tag`), how they are scored, and which figure counts."""

    read: Callable[[Path], list[Prompt]]
    """Of one file."""
    files: tuple[str, ...]
    """Names that the prompts may have in their folder; several files of one pattern are read together."""
    source: str
    """Where they can be had."""
    reward: str
    """The option of the group `reward` that scores, unless a command says otherwise."""
    measure: str = "reward"
    """The measure that is the figure, where the reward has it; its objective otherwise."""
    pictures: int = 1
    """Per prompt, unless a command says otherwise."""
    mean: Literal["categories", "pictures"] = "categories"
    """What the figure is a mean of: of the means of the categories, or of all pictures alike."""
    title: str = ""
    """What the benchmark calls the figure."""
    embedded: str = ""
    """A prompt file inside the package, for a suite that needs no other."""

    def prompts(self, name: str, given: str = "") -> list[Prompt]:
        """Those of the file or folder `given`, or of prompts/<name>. Raises ValueError with where to get them."""
        if self.embedded and not given:
            return PromptSet.read(self.embedded).prompts
        place = Path(given).expanduser() if given else PROMPTS / name
        if place.is_file():
            return self.read(place)
        for pattern in self.files:
            if found := sorted(place.glob(pattern)):
                return [prompt for path in found for prompt in self.read(path)]
        wanted = " or ".join(str(place / pattern) for pattern in self.files)
        raise ValueError(
            f"suite={name}: there is no {wanted}; get the prompts from {self.source}, or say where they are by "
            "prompts=FILE."
        )


def spread(prompts: Sequence[Prompt], number: int) -> list[int]:
    """Positions of `number` prompts, in order, such that every category has its first ones; 0 or too many = all."""
    seen: dict[str, int] = {}
    ranks = []
    for prompt in prompts:
        tag = str(prompt.metadata.get("tag", ""))
        ranks.append(seen.setdefault(tag, 0))
        seen[tag] += 1
    first = sorted(range(len(prompts)), key=lambda i: ranks[i])  # stable: the first of each, then the second …
    return sorted(first[: number or len(prompts)])
