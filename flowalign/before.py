"""Save the images from before training in a folder, so that a resumed run has them too."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowalign.checks.errors import one_line
from flowalign.evaluation import Shown
from flowalign.media import save

log = logging.getLogger("flowalign")
INDEX = "shown.json"


def save_shown(shown: Shown, folder: Path) -> None:
    """Replace the folder by numbered PNG files and an index, which is written last and marks the folder complete."""
    shutil.rmtree(folder, ignore_errors=True)
    for i, image in enumerate(shown.images):
        save(image, folder / f"{i:02d}.png")
    scores = {name: values.tolist() for name, values in shown.scores.items()}
    (folder / INDEX).write_text(json.dumps({"prompts": shown.prompts, "scores": scores}, indent=1))


def load_shown(folder: Path) -> Shown | None:
    """Load what `save_shown` has written (images are quantised to 8 bits), or None without an index.

    What cannot be read, for example after a disk was full, is None too, with a warning: nothing depends on it.
    """
    if not (folder / INDEX).is_file():
        return None
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError) as error:
        log.warning("the images from before training in %s cannot be read: %s", folder, one_line(error))
        return None


def _read(folder: Path) -> Shown:
    about = json.loads((folder / INDEX).read_text())
    files = [folder / f"{i:02d}.png" for i in range(len(about["prompts"]))]
    pictures = [torch.from_numpy(np.array(Image.open(file))).movedim(-1, 0) / 255 for file in files]
    return Shown(torch.stack(pictures), about["prompts"], {k: torch.tensor(v) for k, v in about["scores"].items()})
