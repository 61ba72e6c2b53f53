"""The folder of an evaluation, written picture by picture: an interrupted one goes on where it stopped."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowalign.prompts import Prompt
from flowalign.rewards.pixels import as_bytes

_FIXED = ["sample", "picture", "prompt", "tag"]


@dataclass(frozen=True)
class Asked:
    """A picture to be made: the `picture`-th of the prompt with this `index`; `number` keys its noise."""

    number: int
    index: int
    picture: int
    prompt: Prompt


def asked(prompts: Sequence[Prompt], indices: Iterable[int], pictures: int) -> list[Asked]:
    """First one picture of every prompt, then a second one: more pictures, or fewer prompts, leave the others alike."""
    return [Asked(k * len(prompts) + i, i, k, prompts[i]) for k in range(pictures) for i in indices]


@dataclass
class Record:
    """`about` says what is evaluated and how: whatever could change a score."""

    folder: Path
    about: dict[str, Any]
    measures: list[str]
    rows: dict[int, list[float]] = field(default_factory=dict)
    """By the number of the sample; NaN where it could not be scored."""

    @classmethod
    def opened(cls, folder: Path, about: dict[str, Any], measures: list[str], again: bool) -> Record:
        """The one begun in this folder, or a new one. Raises ValueError where it holds another evaluation."""
        made, mark = cls(folder, json.loads(json.dumps(about)), measures), folder / "about.json"
        if again and mark.is_file():
            mark.unlink()
            shutil.rmtree(folder / "pictures", ignore_errors=True)
        if mark.is_file():
            made._go_on(json.loads(mark.read_text()))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scores.csv").unlink(missing_ok=True)
            mark.write_text(json.dumps(about, indent=2))
        return made

    def _go_on(self, before: dict[str, Any]) -> None:
        keys = [key for key in {**before, **self.about} if before.get(key) != self.about.get(key)]
        if keys:
            was, now = (str(side.get(keys[0]))[:60] for side in (before, self.about))
            raise ValueError(
                f"{self.folder} holds another evaluation ({keys[0]} was {was}, not {now}): use another to=…, or "
                "again=true to replace it."
            )
        path = self.folder / "scores.csv"
        if not path.is_file():
            return
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]  # a killed run may have left half a line
        path.write_bytes(whole)
        for row in csv.DictReader(io.StringIO(whole.decode(), newline="")):
            self.rows[int(row["sample"])] = [float(row[name]) for name in self.measures]

    def missing(self, wanted: Sequence[Asked]) -> list[Asked]:
        """Those without a score; what could not be scored is tried again."""
        return [one for one in wanted if any(map(math.isnan, self.rows.get(one.number, [math.nan])))]

    def add(self, batch: Sequence[Asked], scores: Mapping[str, Tensor]) -> None:
        """Onto the disk at once."""
        for i, one in enumerate(batch):
            self.rows[one.number] = [float(scores[name][i]) for name in self.measures]
        path = self.folder / "scores.csv"
        new = not path.is_file() or not path.stat().st_size
        with path.open("a", newline="", encoding="utf-8") as file:
            self._write(file, batch, header=new)

    def finish(self, wanted: Sequence[Asked]) -> dict[str, Tensor]:
        """The table once more, in order and without what was tried twice; its columns, (N,) each."""
        with (self.folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            self._write(file, wanted, header=True)
        columns = torch.tensor([self.rows[one.number] for one in wanted], dtype=torch.float32)
        return dict(zip(self.measures, columns.T, strict=True))

    def _write(self, file: Any, batch: Sequence[Asked], header: bool) -> None:
        writer = csv.writer(file)
        if header:
            writer.writerow([*_FIXED, *self.measures])
        for one in batch:
            text = " ".join(one.prompt.text.split())  # a row is a line
            about = [one.number, one.picture, text, one.prompt.metadata.get("tag", "")]
            writer.writerow([*about, *(f"{value:.9g}" for value in self.rows[one.number])])

    # ------------------------------------------------------------ pictures

    def keep(self, one: Asked, picture: Tensor) -> None:
        """(3, H, W) in [0, 1], laid out as GenEval's own evaluation reads it."""
        path = self._path(one)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"prompt": one.prompt.text, **one.prompt.metadata}
        (path.parents[1] / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        Image.fromarray(as_bytes(picture)).save(path)

    def kept(self, one: Asked) -> Tensor:
        """What `keep` has written."""
        with Image.open(self._path(one)) as image:
            return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)

    def _path(self, one: Asked) -> Path:
        return self.folder / "pictures" / f"{one.index:05}" / "samples" / f"{one.picture:04}.png"
