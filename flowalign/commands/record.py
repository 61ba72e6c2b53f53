"""The output folder of an evaluation, written batch by batch, so that an interrupted evaluation can be resumed."""

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
class Sample:
    """An image to generate: the `picture`-th of the prompt with this `index`; `number` keys its noise."""

    number: int
    index: int
    picture: int
    prompt: Prompt


def list_samples(prompts: Sequence[Prompt], indices: Iterable[int], pictures: int) -> list[Sample]:
    """List the first image of every prompt, then the second: numbers do not depend on `indices` or `pictures`."""
    return [Sample(k * len(prompts) + i, i, k, prompts[i]) for k in range(pictures) for i in indices]


@dataclass
class Record:
    """The scores and images of an evaluation. `about` holds every setting that could change a score."""

    folder: Path
    about: dict[str, Any]
    measures: list[str]
    rows: dict[int, list[float]] = field(default_factory=dict)
    """Scores by sample number; NaN where an image could not be scored."""

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], measures: list[str], again: bool) -> Record:
        """Resume the record in this folder, or start a new one if there is none or `again` is true.

        Raises ValueError if the folder holds another evaluation.
        """
        record, mark = cls(folder, json.loads(json.dumps(about)), measures), folder / "about.json"
        if again and mark.is_file():
            mark.unlink()
            shutil.rmtree(folder / "pictures", ignore_errors=True)
        if mark.is_file():
            record._resume(json.loads(mark.read_text()))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "scores.csv").unlink(missing_ok=True)
            mark.write_text(json.dumps(about, indent=2))
        return record

    def _resume(self, before: dict[str, Any]) -> None:
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
        complete = written[: written.rfind(b"\n") + 1]  # a killed run may have left half a line
        path.write_bytes(complete)
        for row in csv.DictReader(io.StringIO(complete.decode(), newline="")):
            self.rows[int(row["sample"])] = [float(row[name]) for name in self.measures]

    def missing(self, samples: Sequence[Sample]) -> list[Sample]:
        """Samples without a score, including those that could not be scored before."""
        return [one for one in samples if any(map(math.isnan, self.rows.get(one.number, [math.nan])))]

    def add(self, batch: Sequence[Sample], scores: Mapping[str, Tensor]) -> None:
        """Append the scores of a batch to scores.csv."""
        for i, one in enumerate(batch):
            self.rows[one.number] = [float(scores[name][i]) for name in self.measures]
        path = self.folder / "scores.csv"
        new = not path.is_file() or not path.stat().st_size
        with path.open("a", newline="", encoding="utf-8") as file:
            self._write(file, batch, header=new)

    def finish(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Rewrite scores.csv in order and without repeated rows; returns the scores by measure, (N,) each."""
        with (self.folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            self._write(file, samples, header=True)
        columns = torch.tensor([self.rows[one.number] for one in samples], dtype=torch.float32)
        return dict(zip(self.measures, columns.T, strict=True))

    def _write(self, file: Any, batch: Sequence[Sample], header: bool) -> None:
        writer = csv.writer(file)
        if header:
            writer.writerow([*_FIXED, *self.measures])
        for one in batch:
            text = " ".join(one.prompt.text.split())  # without line breaks, a row is a line
            about = [one.number, one.picture, text, one.prompt.metadata.get("tag", "")]
            writer.writerow([*about, *(f"{value:.9g}" for value in self.rows[one.number])])

    # ------------------------------------------------------------ images

    def save_image(self, one: Sample, image: Tensor) -> None:
        """Save an image (3, H, W) in [0, 1], in the folder layout of GenEval's own evaluation."""
        path = self._path(one)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"prompt": one.prompt.text, **one.prompt.metadata}
        (path.parents[1] / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        Image.fromarray(as_bytes(image)).save(path)

    def load_image(self, one: Sample) -> Tensor:
        """Load the image that `save_image` has written."""
        with Image.open(self._path(one)) as image:
            return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)

    def _path(self, one: Sample) -> Path:
        return self.folder / "pictures" / f"{one.index:05}" / "samples" / f"{one.picture:04}.png"
