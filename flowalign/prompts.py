"""Sets of prompts, and the choice of prompts for epochs and evaluations."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowalign.prompt_files import FORMATS, KINDS, Prompt, read_prompts
from flowalign.prompt_media import check_videos, load_images, load_video, other_kind_hint, video_paths
from flowalign.turns import Turns

ASSETS = Path(__file__).parent / "assets"


def _resolve(path: str) -> Path | None:
    """The existing file: the path itself, with a suffix added, or with Flow-GRPO's `_metadata.jsonl` added."""
    # A file with another suffix is rejected by read_prompts.
    suffixes = ["", *([] if Path(path).suffix in FORMATS else (*FORMATS, "_metadata.jsonl"))]
    names = [f"{path}{suffix}" for suffix in suffixes]
    return next((p for name in names for p in (Path(name).expanduser(), ASSETS / name) if p.is_file()), None)


Painter = Callable[[dict[str, Any], int, int, int], np.ndarray]
"""(metadata of a prompt, image number, height, width) → (height, width, 3) in [0, 1]."""


Shares = Sequence[int] | Mapping[str, int]
"""Turns of each file, or of each value of the metadata key to balance by."""


class PromptSet:
    """Chooses prompts by index. With `balance`, a metadata key such as "tag", each of its values gets an equal share.

    `shares` makes them unequal, and also divides by files: whole numbers of turns, by value of that key (1 for values
    that it does not name), or as a list, for the files that the prompts come from, in their order.

    A prompt's given image is the file named by its `image` key, or is rendered by `images`. Its given video is the file
    or folder of frames named by its `video` key, or one of several named by `videos`.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        balance: str | None = None,
        images: Painter | None = None,
        shares: Shares | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("a prompt set needs at least one prompt")
        self.prompts = prompts
        self._painter = images
        classes: dict[str, list[int]] = {}
        by_file = shares is not None and not isinstance(shares, Mapping)
        for i, prompt in enumerate(prompts):
            kind = prompt.source.rpartition(":")[0] if by_file else _value(prompt, balance)
            classes.setdefault(kind, []).append(i)
        self._classes = list(classes.values())
        self._turns = Turns(_numbers(shares, list(classes), balance))

    @classmethod
    def read(
        cls,
        path: str | Sequence[str],
        balance: str | None = None,
        limit: int | None = None,
        images: Painter | None = None,
        otherwise: str | None = None,
        shares: Shares | None = None,
    ) -> PromptSet:
        """Read the first `limit` prompts of a file, or of the file `otherwise` if it does not exist; or of several.

        A path that does not exist may name a file inside this package. Without a suffix, those of FORMATS are tried.
        """
        paths = [path] if isinstance(path, str) else path
        prompts = [prompt for one in paths for prompt in cls._read_file(one, limit, otherwise)]
        return cls(prompts, balance, images, shares)

    @staticmethod
    def _read_file(path: str, limit: int | None, otherwise: str | None) -> list[Prompt]:
        candidates = [path, *([] if otherwise is None else [otherwise])]
        found = next((file for name in candidates if (file := _resolve(name)) is not None), None)
        if found is None:
            embedded = ", ".join(sorted(str(p.relative_to(ASSETS)) for p in ASSETS.glob("*/*.jsonl")))
            wanted = Path(path).expanduser()
            siblings = sorted(p.name for p in wanted.parent.glob("*") if p.suffix in FORMATS or p.stem == wanted.name)
            nearby = f"its folder has {', '.join(siblings[:8])}; " if siblings else ""
            suffixes = "" if wanted.suffix in FORMATS else f" ({KINDS})"
            raise ValueError(f"there is no prompt file {path}{suffixes}; {nearby}embedded ones are {embedded}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit keeps the first prompts of a file and must be at least 1 (got {limit})")
        return read_prompts(found)[:limit]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def require_images(self, video: bool = False) -> None:
        """Raise ValueError unless every prompt has a given image, or with `video` a given video."""
        for prompt in self.prompts if video or self._painter is None else ():
            if video:
                check_videos(prompt)
            elif "image" not in prompt.metadata:
                raise ValueError(
                    f"{prompt.source}: no image to learn from: give every line an `image` (a path beside the prompt "
                    f"file{other_kind_hint(prompt, 'video')}), set data.train.images, or use data=shapes"
                )

    def images(
        self, indices: Sequence[int], numbers: Sequence[int], height: int, width: int, frames: int | None = None
    ) -> Tensor:
        """A given image per prompt, (B, 3, H, W) in [0, 1], or with `frames` a video, (B, F, 3, H, W).

        numbers: B integers that choose among the images or videos of each prompt.
        """
        chosen = [(self.prompts[i], number) for i, number in zip(indices, numbers, strict=True)]
        if frames is None:
            return torch.stack([self._image(*choice, height, width) for choice in chosen])
        return torch.stack([load_video(*choice, frames, (height, width)) for choice in chosen])

    def variant(self, index: int, number: int, video: bool = False) -> int:
        """The smallest number that chooses the same image or video of a prompt as `number` does."""
        prompt = self.prompts[index]
        if video:
            return number % len(video_paths(prompt))
        return 0 if self._painter is None or "image" in prompt.metadata else number

    def _image(self, prompt: Prompt, number: int, height: int, width: int) -> Tensor:
        if self._painter is None or "image" in prompt.metadata:
            return load_images(prompt, (height, width))[0]
        return torch.from_numpy(self._painter(prompt.metadata, number, height, width)).permute(2, 0, 1)

    def epoch(self, seed: int, epoch: int, number: int) -> list[int]:
        """Indices of this epoch's prompts. They depend on the arguments only, so a resumed run continues exactly.

        Each class is traversed in shuffled passes that continue across epochs, so every prompt is used before any
        repeats. Within an epoch no prompt repeats while its class has an unused one.
        """
        chosen: list[int] = []
        for index, members in enumerate(self._classes):
            start, stop = (self._turns.taken(index, drawn * number) for drawn in (epoch, epoch + 1))
            size, share = len(members), self._turns.most(index, number)
            for i in range(start, stop):
                chosen.append(members[_pass_order(size, share, (seed, index), i // size)[i % size]])
        order = np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(len(chosen))
        return [chosen[i] for i in order]

    def fixed(self, number: int) -> list[int]:
        """A fixed choice of `number` indices: classes in turn, each traversed cyclically in file order."""
        turns = ((self._turns.whose(i), i) for i in range(number))
        return [(members := self._classes[k])[self._turns.taken(k, i) % len(members)] for k, i in turns]


def _value(prompt: Prompt, balance: str | None) -> str:
    """The value to balance by, as JSON; "" if there is none."""
    if balance is None:
        return ""
    if balance not in prompt.metadata:
        known = ", ".join(sorted(prompt.metadata)) or "none"
        raise ValueError(
            f"{prompt.source}: no {balance!r} to balance by; the keys of this prompt are: {known} "
            "(data=folder does not balance unless it is told to, and balance=null switches it off)"
        )
    return json.dumps(prompt.metadata[balance], sort_keys=True)


def _numbers(shares: Shares | None, classes: Sequence[str], balance: str | None) -> list[int]:
    """The turns of each class."""
    if isinstance(shares, Mapping):
        if balance is None:
            raise ValueError("shares by name need a key whose values they name: set balance, or give a list for files")
        named = {name if name in classes else json.dumps(name): share for name, share in shares.items()}
        if unknown := sorted(named.keys() - set(classes)):
            raise ValueError(f"shares names {', '.join(unknown)}, and the values of {balance} are {', '.join(classes)}")
        return [named.get(kind, 1) for kind in classes]
    if shares is None:
        return [1] * len(classes)
    if balance is not None:
        raise ValueError("a list of shares divides by files, and balance by a key: use one of them")
    if len(shares) != len(classes):
        raise ValueError(f"shares has {len(shares)} numbers, and the prompts come from {len(classes)} files")
    return list(shares)


@lru_cache(maxsize=64)
def _pass_order(size: int, window: int, key: tuple[int, int], number: int) -> list[int]:
    """Order of pass `number` through range(size): shuffled, with no index twice in any `window` successive draws."""
    if window > size:  # repeats are unavoidable
        return _shuffled(size, key, number).tolist()
    order = _shuffled(size, key, 0).tolist()
    for i in range(1, number + 1):
        order = _next_pass_order(order, window, _shuffled(size, key, i))
    return order


def _shuffled(size: int, key: tuple[int, int], number: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([*key, number])).permutation(size)


def _next_pass_order(last: list[int], window: int, rank: np.ndarray) -> list[int]:
    """Indices sorted by rank, each delayed until its last use lies `window` draws back."""
    ready: list[tuple[int, int]] = []
    order: list[int] = []
    for i in last[: len(last) - window]:
        heapq.heappush(ready, (int(rank[i]), i))
    for i in last[len(last) - window :]:
        heapq.heappush(ready, (int(rank[i]), i))
        order.append(heapq.heappop(ready)[1])
    return order + [i for _, i in sorted(ready)]
