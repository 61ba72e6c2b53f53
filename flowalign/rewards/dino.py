"""How alike a picture and a given one are, by DINOv2 (arXiv:2304.07193) or DINOv3: for editing and consistency."""

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
    """Cosine in [-1, 1] of the class tokens of the picture and of the one that the prompt's line names under `key`.

    folder: where the named files are, by default the working directory; a list of names stands for its first.
    """

    pretrained: str = "facebook/dinov2-base"
    key: str = "image"
    folder: str | None = None
    _references: dict[Path, Tensor] = field(default_factory=dict, init=False, repr=False)

    def load(self) -> nn.Module:
        return load_model("AutoModel", self.pretrained, self.revision, self.weights_dtype)

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del prompts
        given = torch.stack([self._reference(entry) for entry in metadata]).to(pictures.device)
        return (self.embed(pictures) * given).sum(dim=-1)

    def embed(self, pictures: Tensor) -> Tensor:
        """(b, 3, H, W) → (b, D) of length 1."""
        hidden = self.model(pixel_values=self.transform(pictures).to(self.weights_dtype)).last_hidden_state
        return normalize(hidden[:, 0].float(), dim=-1)

    def _reference(self, entry: dict[str, Any]) -> Tensor:
        named = entry.get(self.key)
        named = named[0] if isinstance(named, list) and named else named
        if not isinstance(named, str):
            raise ValueError(f"{self.name} compares with a given picture: every line needs a file under {self.key!r}.")
        path = Path(self.folder or ".").expanduser() / named
        if path not in self._references:  # a group shares it, and so does every epoch
            try:
                with Image.open(path) as image:
                    picture = image_to_tensor(image)
            except OSError as error:
                raise ValueError(f"{self.name}: the picture {path} cannot be read (set `folder`?).") from error
            self._references[path] = self.embed(picture[None].to(self.model_device))[0].cpu()
        return self._references[path]

    @torch.no_grad()
    def self_check(self) -> None:
        """RewardError unless a darker drawing is nearer to the drawing than its own pieces in another order are.

        Random networks find the opposite: they see which colours there are, and not how they make a shape.
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
    """(N, 3, H, W) cut into pieces × pieces tiles, which are dealt again."""
    rows = pictures.unflatten(-1, (pieces, -1)).unflatten(-3, (pieces, -1))  # N, 3, rows, h, columns, w
    tiles = rows.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)
    dealt = tiles[torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))]
    return dealt.unflatten(0, (pieces, pieces)).permute(2, 3, 0, 4, 1, 5).flatten(-2).flatten(-3, -2)
