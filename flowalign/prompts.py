"""Prompt files, and which prompts an epoch or an evaluation uses."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.beside import check_videos, given_videos, instead, pictures_of, video_of
from flowalign.footage import read

ASSETS = Path(__file__).parent / "assets"
SUFFIXES = [".jsonl", ".txt"]


@dataclass(frozen=True)
class Prompt:
    """One prompt; `metadata` is whatever else its line holds, for the rewards; `source` is "file:line"."""

    text: str
    negative: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a file, in order.

    .txt has one a line; .jsonl an object a line, with `prompt` and perhaps `negative_prompt`, the rest being metadata.
    Empty lines are skipped. A line that cannot be read raises ValueError "file:line: reason".
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: prompts are read from .txt or .jsonl files")
    parse, prompts = _parse_text if path.suffix == ".txt" else _parse_json, []
    # Not splitlines(): that would also cut at rarer separators, which prompts scraped from the web contain.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        source = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if line:
                prompts.append(parse(line, source))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: no prompt in this file")
    return prompts


def _parse_text(line: str, source: str) -> Prompt:
    return Prompt(line, source=source)


def _parse_json(line: str, source: str) -> Prompt:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    text, negative = record.pop("prompt", None), record.pop("negative_prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`prompt` must be a non-empty text, got {text!r}")
    if not isinstance(negative, str | None):
        raise ValueError(f"`negative_prompt` must be a text, got {negative!r}")
    return Prompt(text, negative, record, source)


def _resolve(path: str) -> Path | None:
    """The file itself, one of this name and a suffix, or Flow-GRPO's `train_metadata.jsonl` for `train`."""
    # A file of another kind is refused when it is read.
    suffixes = ["", *([] if Path(path).suffix in SUFFIXES else (*SUFFIXES, "_metadata.jsonl"))]
    names = [f"{path}{suffix}" for suffix in suffixes]
    return next((p for name in names for p in (Path(name).expanduser(), ASSETS / name) if p.is_file()), None)


Painter = Callable[[dict[str, Any], int, int, int], np.ndarray]
"""Metadata of a prompt, the number of the picture, height, width → (height, width, 3) in [0, 1]."""


class PromptSet:
    """Chooses prompts by index; with `balance`, a metadata key (say "tag"), each of its values gets an equal share.

    A prompt's real picture is the file that it names under `image`, or painted by `images`; its real video is the file
    or the folder of frames that it names under `video`, or one of several under `videos`.
    """

    def __init__(self, prompts: list[Prompt], balance: str | None = None, images: Painter | None = None) -> None:
        if not prompts:
            raise ValueError("a prompt set needs at least one prompt")
        self.prompts = prompts
        self._painter = images
        classes: dict[Any, list[int]] = {}
        for i, prompt in enumerate(prompts):
            if balance is not None and balance not in prompt.metadata:
                known = ", ".join(sorted(prompt.metadata)) or "none"
                raise ValueError(f"{prompt.source}: no {balance!r} to balance by; the keys of this prompt are: {known}")
            classes.setdefault(
                json.dumps(prompt.metadata[balance], sort_keys=True) if balance is not None else None, []
            ).append(i)
        self._classes = list(classes.values())

    @classmethod
    def read(
        cls,
        path: str,
        balance: str | None = None,
        limit: int | None = None,
        images: Painter | None = None,
        otherwise: str | None = None,
    ) -> PromptSet:
        """The first `limit` prompts of a file, or of the file `otherwise` where there is no such file.

        A path that does not exist here may name one inside this package; without a suffix it stands for .jsonl or .txt.
        """
        named = [path, *([] if otherwise is None else [otherwise])]
        found = next((file for name in named if (file := _resolve(name)) is not None), None)
        if found is None:
            known = ", ".join(sorted(str(p.relative_to(ASSETS)) for p in ASSETS.glob("*/*.jsonl")))
            beside = sorted(p.name for p in Path(path).expanduser().parent.glob("*") if p.suffix in SUFFIXES)
            there = f"its folder has {', '.join(beside[:8])}; " if beside else ""
            ways = "" if Path(path).suffix in SUFFIXES else " (.txt or .jsonl)"
            raise ValueError(f"there is no prompt file {path}{ways}; {there}embedded ones are {known}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit keeps the first prompts of a file and must be at least 1 (got {limit})")
        return cls(read_prompts(found)[:limit], balance, images)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def require_images(self, video: bool = False) -> None:
        """Raises ValueError unless there is a real picture, or else a real video, for every prompt."""
        for prompt in self.prompts if video or self._painter is None else ():
            if video:
                check_videos(prompt)
            elif "image" not in prompt.metadata:
                raise ValueError(
                    f"{prompt.source}: no picture to learn from: give every line an `image` (a path beside the prompt "
                    f"file{instead(prompt, 'video')}), set data.train.images, or use data=shapes"
                )

    def images(
        self, indices: Sequence[int], numbers: Sequence[int], height: int, width: int, frames: int | None = None
    ) -> Tensor:
        """A real image for each of the prompts, (B, 3, H, W) in [0, 1], or with `frames` a video (B, F, 3, H, W).

        `numbers` (B) choose among the images or videos of each prompt.
        """
        asked = [(self.prompts[i], number) for i, number in zip(indices, numbers, strict=True)]
        if frames is None:
            return torch.stack([self._image(*one, height, width) for one in asked])
        return torch.stack([video_of(*one, partial(read, frames=frames, size=(height, width))) for one in asked])

    def variant(self, index: int, number: int, video: bool = False) -> int:
        """The smallest number that chooses the same image or video of a prompt as `number` does."""
        prompt = self.prompts[index]
        if video:
            return number % len(given_videos(prompt))
        return 0 if self._painter is None or "image" in prompt.metadata else number

    def _image(self, prompt: Prompt, number: int, height: int, width: int) -> Tensor:
        if self._painter is None or "image" in prompt.metadata:
            return pictures_of(prompt, (height, width))[0]
        return torch.from_numpy(self._painter(prompt.metadata, number, height, width)).permute(2, 0, 1)

    def epoch(self, seed: int, epoch: int, number: int) -> list[int]:
        """Indices of this epoch's prompts, a function of the arguments alone: a resumed run goes on as it would have.

        Each class is walked in shuffled passes that run on from epoch to epoch, so all is seen before any repeats;
        within an epoch nothing repeats while its class has another prompt left.
        """
        chosen: list[int] = []
        share = -(-number // len(self._classes))
        for index, members in enumerate(self._classes):
            start, stop = self._num_drawn(index, epoch * number), self._num_drawn(index, (epoch + 1) * number)
            size = len(members)
            for i in range(start, stop):
                chosen.append(members[_pass_order(size, share, (seed, index), i // size)[i % size]])
        order = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(len(chosen))
        return [chosen[i] for i in order]

    def fixed(self, number: int) -> list[int]:
        """The same `number` indices always: classes in turn, each walked in its order and begun again when it ends."""
        kinds = len(self._classes)
        return [self._classes[i % kinds][i // kinds % len(self._classes[i % kinds])] for i in range(number)]

    def _num_drawn(self, index: int, total: int) -> int:
        """How many of the first `total` prompts ever drawn belong to one class: every class in turn."""
        return (total - index + len(self._classes) - 1) // len(self._classes)


@lru_cache(maxsize=64)
def _pass_order(size: int, window: int, key: tuple[int, int], number: int) -> list[int]:
    """Pass `number` through range(size): shuffled, and such that no `window` successive draws hold an index twice."""
    if window > size:  # repeats are unavoidable
        return _shuffled(size, key, number).tolist()
    order = _shuffled(size, key, 0).tolist()
    for i in range(1, number + 1):
        order = _next_pass_order(order, window, _shuffled(size, key, i))
    return order


def _shuffled(size: int, key: tuple[int, int], number: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([*key, number])).permutation(size)


def _next_pass_order(last: list[int], window: int, rank: np.ndarray) -> list[int]:
    """Indices by rank, each waiting until its last use lies `window` draws back."""
    ready: list[tuple[int, int]] = []
    order: list[int] = []
    for i in last[: len(last) - window]:
        heapq.heappush(ready, (int(rank[i]), i))
    for i in last[len(last) - window :]:
        heapq.heappush(ready, (int(rank[i]), i))
        order.append(heapq.heappop(ready)[1])
    return order + [i for _, i in sorted(ready)]
