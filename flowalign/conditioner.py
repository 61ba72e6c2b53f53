"""Prompt encoding, cached on the CPU up to a limit, and on disk if a folder is given."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch

from flowalign.embeddings import Embeddings
from flowalign.exhausted import explain_oom
from flowalign.models.base import FlowModel
from flowalign.prompt_media import image_paths, load_images
from flowalign.prompts import Prompt
from flowalign.types import Conditioning

Key = tuple[str, ...]
Area = tuple[int, int, int | None]
"""Height, width and frames."""
VERSION = "2, without autocast"
"""Version of the encoding procedure. Cached files of other versions are not used."""


@dataclass(frozen=True)
class Encoding:
    """Settings of prompt encoding."""

    cache: str | None = None
    """Folder of the disk cache; None: no disk cache."""
    release: bool = False
    """Encode every prompt of the run before training, then free the text encoders."""
    batch_size: int = 1
    """Prompts per forward pass. With more than one, rounding and padding depend on the other prompts of the batch, so a
    resumed run, which batches prompts differently, equals the uninterrupted one only up to rounding."""
    keep_gib: float = 4.0
    """Size of each rank's cache in CPU memory. Beyond it the least recently used rows are evicted, and read or encoded
    again when needed. Rows of the latest request are never evicted, and none is if it could not be restored: with
    `release` and no `cache`."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.keep_gib < 0:
            raise ValueError(
                f"batch_size must be at least 1 and keep_gib at least 0 (got batch_size={self.batch_size}, "
                f"keep_gib={self.keep_gib})."
            )

    @property
    def max_bytes(self) -> float:
        """Largest size of the cache in CPU memory."""
        return math.inf if self.release and self.cache is None else self.keep_gib * 2**30


class Conditioner:
    """Encodes prompts into Conditioning rows. The unconditional branch is encoded only if guidance is used."""

    def __init__(self, model: FlowModel, guided: bool, encoding: Encoding | None = None) -> None:
        self.model, self.guided, self.encoding = model, guided, encoding or Encoding()
        self._rows: OrderedDict[Key, Conditioning] = OrderedDict()
        """Most recently used last."""
        self._num_bytes = 0
        folder = self.encoding.cache
        self._disk = None if folder is None else Embeddings(folder, f"{model.text_fingerprint()} {VERSION}")

    def __call__(self, prompts: Sequence[Prompt], device: torch.device, size: Area) -> Conditioning:
        """One row per prompt, in order. The output size matters only to families that are conditioned on images."""
        self.prepare(prompts, size)
        return Conditioning.cat([self._rows[self._key(p, size)] for p in prompts]).to(device)

    def prepare(self, prompts: Sequence[Prompt], size: Area) -> None:
        """Encode the prompts that are not cached. All of them stay in memory until the next request."""
        requested = {self._key(p, size): p for p in prompts}
        missing = [key for key in requested if not self._load(key)]
        for start in range(0, len(missing), self.encoding.batch_size):
            part = missing[start : start + self.encoding.batch_size]
            self._encode(part, [requested[key] for key in part], size)
        self._evict(requested)

    def prepare_all(
        self, prompts: Sequence[Prompt], size: Area, report: Callable[[int], None] = lambda done: None
    ) -> None:
        """`prepare` for more prompts than fit in memory. `report` receives the number of distinct prompts done."""
        distinct = [*{self._key(p, size): p for p in prompts}.values()]
        for start in range(0, len(distinct), self.encoding.batch_size):
            part = distinct[start : start + self.encoding.batch_size]
            self.prepare(part, size)
            report(start + len(part))

    def missing(self, prompts: Sequence[Prompt], size: Area) -> list[Prompt]:
        """The prompts with neither a row in memory nor a file. Files are not read for this."""
        return [p for p in prompts if not self._is_cached(self._key(p, size))]

    def _is_cached(self, key: Key) -> bool:
        return key in self._rows or (self._disk is not None and self._disk.contains(key))

    def _load(self, key: Key) -> bool:
        """Mark the row as used, reading it from disk if necessary. Whether it is now in memory."""
        if key in self._rows:
            self._rows.move_to_end(key)
        elif self._disk is not None and (row := self._disk.read(key)) is not None:
            self._store(key, row)
        return key in self._rows

    def _store(self, key: Key, row: Conditioning) -> None:
        self._rows[key] = row
        self._num_bytes += _bytes(row)

    def _evict(self, requested: Container[Key]) -> None:
        """Evict the least recently used rows. The requested ones, which are the last, stay."""
        while self._num_bytes > self.encoding.max_bytes and next(iter(self._rows)) not in requested:
            self._num_bytes -= _bytes(self._rows.popitem(last=False)[1])

    def _key(self, prompt: Prompt, size: Area) -> Key:
        """Everything that the row depends on, except the encoder."""
        text = (prompt.text, prompt.negative or "") if self.guided else (prompt.text,)
        if not self.model.sees_images:
            return text
        seen = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in image_paths(prompt)]
        return (*text, *seen, f"{size}")

    @explain_oom("encode")
    def _encode(self, keys: list[Key], prompts: list[Prompt], size: Area) -> None:
        negatives = [p.negative or "" for p in prompts] if self.guided else None
        texts = [p.text for p in prompts]
        # Rollouts and evaluations run under autocast, the memory plan does not: a row must not depend on the caller.
        with torch.autocast(self.model.device.type, enabled=False):
            if self.model.sees_images:
                images = [torch.stack(load_images(p, size[:2])).to(self.model.device) for p in prompts]
                cond = self.model.encode(texts, negatives, images, size)
            else:
                cond = self.model.encode(texts, negatives)
        for i, key in enumerate(keys):
            # Cloned, since a view of one row would keep the whole batch in memory.
            row = Conditioning({name: t[i : i + 1].cpu().clone() for name, t in cond.items()})
            self._store(key, row)
            if self._disk is not None:
                self._disk.write(key, row)


def _bytes(row: Conditioning) -> int:
    return sum(t.nbytes for t in row.values())
