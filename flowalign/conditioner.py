"""Text conditioning, encoded a prompt at a time and kept on the CPU within bounds, and on disk if a folder is given."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch

from flowalign.beside import pictures_of, seen_pictures
from flowalign.embeddings import Embeddings
from flowalign.exhausted import memory_of
from flowalign.models.base import FlowModel
from flowalign.prompts import Prompt
from flowalign.types import Conditioning

Key = tuple[str, ...]
Area = tuple[int, int, int | None]
"""Height, width and frames."""
VERSION = "2, without autocast"
"""Of the way from prompt to row: files of another one are not used."""


@dataclass(frozen=True)
class Encoding:
    """How prompts become conditioning."""

    cache: str | None = None
    """Folder where encoded prompts are kept and found again; None: nowhere."""
    release: bool = False
    """Encode every prompt of the run before training, and let the text encoders leave memory."""
    batch_size: int = 1
    """Prompts in one forward pass. With several, rounding and padding depend on the neighbours: a resumed run, which
    meets prompts in other company, then equals the uninterrupted one only to rounding."""
    keep_gib: float = 4.0
    """Rows in the memory of each rank. Beyond it the longest unused leave, to be read or encoded again when asked for;
    never those that were asked for last, and none where nothing could bring them back: released without a folder."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.keep_gib < 0:
            raise ValueError(
                f"prompts are encoded 1 or more at a time and kept in 0 GiB or more (got batch_size={self.batch_size}, "
                f"keep_gib={self.keep_gib})."
            )

    @property
    def max_bytes(self) -> float:
        """Bytes."""
        return math.inf if self.release and self.cache is None else self.keep_gib * 2**30


class Conditioner:
    """Prompts to Conditioning rows. The unconditional branch is encoded only if somebody will guide with it."""

    def __init__(self, model: FlowModel, guided: bool, encoding: Encoding | None = None) -> None:
        self.model, self.guided, self.encoding = model, guided, encoding or Encoding()
        self._rows: OrderedDict[Key, Conditioning] = OrderedDict()
        """The last used last."""
        self._num_bytes = 0
        folder = self.encoding.cache
        self._disk = None if folder is None else Embeddings(folder, f"{model.text_fingerprint()} {VERSION}")

    def __call__(self, prompts: Sequence[Prompt], device: torch.device, size: Area) -> Conditioning:
        """One row a prompt, in order. The size of what will be made matters only to families that see pictures."""
        self.prepare(prompts, size)
        return Conditioning.cat([self._rows[self._key(p, size)] for p in prompts]).to(device)

    def prepare(self, prompts: Sequence[Prompt], size: Area) -> None:
        """Encodes what is not known yet; all of it stays in memory until other prompts are asked for."""
        asked = {self._key(p, size): p for p in prompts}
        missing = [key for key in asked if not self._load(key)]
        for start in range(0, len(missing), self.encoding.batch_size):
            part = missing[start : start + self.encoding.batch_size]
            self._encode(part, [asked[key] for key in part], size)
        self._evict(asked)

    def prepare_all(
        self, prompts: Sequence[Prompt], size: Area, report: Callable[[int], None] = lambda done: None
    ) -> None:
        """The same of more than memory may hold; `report` is told how many of the distinct prompts are done."""
        distinct = [*{self._key(p, size): p for p in prompts}.values()]
        for start in range(0, len(distinct), self.encoding.batch_size):
            part = distinct[start : start + self.encoding.batch_size]
            self.prepare(part, size)
            report(start + len(part))

    def missing(self, prompts: Sequence[Prompt], size: Area) -> list[Prompt]:
        """Those of which there is neither a row in memory nor a file, which is not read for it."""
        return [p for p in prompts if not self._is_cached(self._key(p, size))]

    def _is_cached(self, key: Key) -> bool:
        return key in self._rows or (self._disk is not None and self._disk.contains(key))

    def _load(self, key: Key) -> bool:
        """Whether the row is in memory, as the last used one, or could be read into it."""
        if key in self._rows:
            self._rows.move_to_end(key)
        elif self._disk is not None and (row := self._disk.read(key)) is not None:
            self._store(key, row)
        return key in self._rows

    def _store(self, key: Key, row: Conditioning) -> None:
        self._rows[key] = row
        self._num_bytes += _bytes(row)

    def _evict(self, asked: Container[Key]) -> None:
        """The longest unused rows leave memory; those that are asked for are behind all others."""
        while self._num_bytes > self.encoding.max_bytes and next(iter(self._rows)) not in asked:
            self._num_bytes -= _bytes(self._rows.popitem(last=False)[1])

    def _key(self, prompt: Prompt, size: Area) -> Key:
        """All that the row depends on beside the encoder."""
        text = (prompt.text, prompt.negative or "") if self.guided else (prompt.text,)
        if not self.model.sees_images:
            return text
        seen = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in seen_pictures(prompt)]
        return (*text, *seen, f"{size}")

    @memory_of("encode")
    def _encode(self, keys: list[Key], prompts: list[Prompt], size: Area) -> None:
        negatives = [p.negative or "" for p in prompts] if self.guided else None
        texts = [p.text for p in prompts]
        # Rollouts and evaluations run under autocast, the plan of memory does not: a row must not tell who asked first.
        with torch.autocast(self.model.device.type, enabled=False):
            if self.model.sees_images:
                images = [torch.stack(pictures_of(p, size[:2])).to(self.model.device) for p in prompts]
                cond = self.model.encode(texts, negatives, images, size)
            else:
                cond = self.model.encode(texts, negatives)
        for i, key in enumerate(keys):
            # A copy: a view of one row would keep the whole batch in memory.
            row = Conditioning({name: t[i : i + 1].cpu().clone() for name, t in cond.items()})
            self._store(key, row)
            if self._disk is not None:
                self._disk.write(key, row)


def _bytes(row: Conditioning) -> int:
    return sum(t.nbytes for t in row.values())
