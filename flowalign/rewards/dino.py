"""Similarity to a reference image by DINOv2 (arXiv:2304.07193) or DINOv3, for editing and consistency."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from flowalign.rewards.base import RewardError
from flowalign.rewards.drawings import drawings, image_to_tensor
from flowalign.rewards.embedding import ModelReward
from flowalign.rewards.weights import load_model


@dataclass(eq=False)
class DinoSimilarity(ModelReward):
    """Cosine similarity in [-1, 1] of the class tokens of an image and of its reference image.

    key: entry of the prompt's line that names the reference, or a list of which the first is used; folder: where the
    named files are, by default the working directory.
    """

    pretrained: str = "facebook/dinov2-base"
    key: str = "image"
    folder: str | None = None
    _references: dict[Path, Tensor] = field(default_factory=dict, init=False, repr=False)

    def load(self) -> nn.Module:
        return load_model("AutoModel", self.pretrained, self.revision, self.weights_dtype)

    def check_prompt(self, prompt: str, metadata: dict[str, Any]) -> None:
        """Raise ValueError if no reference image is named, or if it is not there."""
        del prompt
        if not (path := self._path(metadata)).is_file():
            raise ValueError(f"{self.name}: there is no image {path} (set `folder`?).")

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del prompts
        given = torch.stack([self._reference(entry) for entry in metadata]).to(pictures.device)
        return (self.embed(pictures) * given).sum(dim=-1)

    def embed(self, pictures: Tensor) -> Tensor:
        """(b, 3, H, W) → unit vectors (b, D)."""
        hidden = self.model(pixel_values=self.transform(pictures).to(self.weights_dtype)).last_hidden_state
        return normalize(hidden[:, 0].float(), dim=-1)

    def _path(self, entry: dict[str, Any]) -> Path:
        named = entry.get(self.key)
        named = named[0] if isinstance(named, list) and named else named
        if not isinstance(named, str):
            raise ValueError(
                f"{self.name} compares with a reference image: every line needs a file under {self.key!r}."
            )
        return Path(self.folder or ".").expanduser() / named

    def _reference(self, entry: dict[str, Any]) -> Tensor:
        path = self._path(entry)
        if path not in self._references:  # shared by a group and by all epochs
            try:
                with Image.open(path) as image:
                    picture = image_to_tensor(image)
            except OSError as error:
                raise ValueError(f"{self.name}: the image {path} cannot be read (set `folder`?).") from error
            self._references[path] = self.embed(picture[None].to(self.model_device))[0].cpu()
        return self._references[path]

    @torch.no_grad()
    def self_check(self) -> None:
        """Raise RewardError unless a darkened drawing is more similar to the drawing than its shuffled tiles are.

        Random networks find the opposite: they see which colours are present but not the shapes they form.
        """
        plain = drawings().to(self.model_device)
        first, darker, pieces = (self.embed(pictures) for pictures in (plain, 0.8 * plain, shuffle_tiles(plain)))
        right = int(((first * darker).sum(dim=-1) > (first * pieces).sum(dim=-1)).sum())
        if right < len(plain) - 1:
            raise RewardError(
                f"{self.name} finds a darker drawing more alike than the drawing's shuffled pieces in {right} of "
                f"{len(plain)} known cases: its weights are not trained."
            )


def shuffle_tiles(pictures: Tensor, pieces: int = 8) -> Tensor:
    """Cut (N, 3, H, W) into pieces × pieces tiles and permute these."""
    rows = pictures.unflatten(-1, (pieces, -1)).unflatten(-3, (pieces, -1))  # N, 3, rows, h, columns, w
    tiles = rows.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    permuted = tiles[torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))]
    return permuted.unflatten(0, (pieces, pieces)).permute(2, 3, 0, 4, 1, 5).flatten(-2).flatten(-3, -2)
