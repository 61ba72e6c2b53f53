"""Text conditioning, encoded once a prompt and kept on the CPU, and on disk if a folder is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flowalign.embeddings import Embeddings
from flowalign.exhausted import memory_of
from flowalign.models.base import FlowModel
from flowalign.prompts import Prompt, pictures_of, seen_pictures
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


class Conditioner:
    """Prompts to Conditioning rows. The unconditional branch is encoded only if somebody will guide with it."""

    def __init__(self, model: FlowModel, guided: bool, encoding: Encoding | None = None) -> None:
        self.model, self.guided, self.encoding = model, guided, encoding or Encoding()
        self._rows: dict[Key, Conditioning] = {}
        folder = self.encoding.cache
        self._disk = None if folder is None else Embeddings(folder, f"{model.text_fingerprint()} {VERSION}")

    def __call__(self, prompts: Sequence[Prompt], device: torch.device, size: Area) -> Conditioning:
        """One row a prompt, in order. The size of what will be made matters only to families that see pictures."""
        self.prepare(prompts, size)
        return Conditioning.cat([self._rows[self._key(p, size)] for p in prompts]).to(device)

    def prepare(self, prompts: Sequence[Prompt], size: Area, report: Callable[[int], None] | None = None) -> None:
        """Encodes what is not known yet; `report` is told how many of the distinct prompts are done."""
        asked = {self._key(p, size): p for p in prompts}
        missing = [key for key in asked if key not in self._rows]
        if self._disk is not None:
            found = {key: row for key in missing if (row := self._disk.read(key)) is not None}
            self._rows |= found
            missing = [key for key in missing if key not in found]
        for start in range(0, len(missing), self.encoding.batch_size):
            part = missing[start : start + self.encoding.batch_size]
            self._encode(part, [asked[key] for key in part], size)
            if report is not None:
                report(len(asked) - len(missing) + start + len(part))

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
            self._rows[key] = row
            if self._disk is not None:
                self._disk.write(key, row)
