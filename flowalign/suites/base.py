"""Description of a benchmark for `flowalign evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowalign.prompts import Prompt, PromptSet

PROMPTS = Path("prompts")
"""Default folder of prompt files, with one subfolder per suite."""


@dataclass(frozen=True)
class Suite:
    """Prompts with a category each (`tag`), the reward that scores them, and the figure to report."""

    read: Callable[[Path], list[Prompt]]
    """Reads the prompts of one file."""
    files: tuple[str, ...]
    """Patterns of the prompt files in their folder. The first that matches is used, and all its files are read."""
    source: str
    """Where the prompts can be downloaded."""
    reward: str
    """Default option of the config group `reward`."""
    measure: str = "reward"
    """The reported measure, if the reward has it; otherwise the objective is reported."""
    pictures: int = 1
    """Default number of images per prompt."""
    mean: Literal["categories", "pictures"] = "categories"
    """Whether the figure is the mean of the category means, or the mean of all images."""
    title: str = ""
    """The benchmark's own name for the figure."""
    embedded: str = ""
    """Prompt file inside the package, for a suite that needs no download."""

    def prompts(self, name: str, given: str = "") -> list[Prompt]:
        """Read the prompts from the file or folder `given`, or from prompts/<name>.

        Raises ValueError, with the place to get them, if there are none.
        """
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
    """Ascending indices of `number` prompts, the first ones of every category; all if 0 or more than there are."""
    seen: dict[str, int] = {}
    ranks = []
    for prompt in prompts:
        tag = str(prompt.metadata.get("tag", ""))
        ranks.append(seen.setdefault(tag, 0))
        seen[tag] += 1
    first = sorted(
        range(len(prompts)), key=lambda i: ranks[i]
    )  # stable sort: the first of each category, then the second, …
    return sorted(first[: number or len(prompts)])
