"""Colour classifiers for GenEval: CLIP, as in the benchmark, or hue and saturation without a model."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flowalign.rewards.clip_score import ClipScore
from flowalign.rewards.geneval_rules import COLOURS, Thing
from flowalign.rewards.weights import cached

_GREY = 0.6  # background around a masked object: #999, as in the benchmark


class Colours(Protocol):
    """Names the colours of detected objects."""

    def __call__(self, picture: Tensor, things: Sequence[Thing]) -> list[str | None]:
        """Image (3, H, W) in [0, 1] → one of geneval_rules.COLOURS, or None, for each object."""
        ...


def crop(picture: Tensor, thing: Thing) -> Tensor:
    """Crop the box of an object, (3, h, w) with at least one pixel; pixels outside its mask become grey."""
    height, width = picture.shape[-2:]
    left, top = (min(max(int(edge), 0), size - 1) for edge, size in zip(thing.box[:2], (width, height), strict=True))
    right, bottom = (max(round(edge), start + 1) for edge, start in zip(thing.box[2:], (left, top), strict=True))
    if thing.mask is not None:
        picture = picture.where(thing.mask.to(picture.device), _GREY)
    return picture[:, top:bottom, left:right]


@cached(maxsize=2)
def _clip(pretrained: str, revision: str | None) -> ClipScore:
    """The network, shared by all rewards that use it."""
    return ClipScore(pretrained, revision=revision)


class ClipColours:
    """Zero-shot CLIP classification of the cropped object, with three text templates per colour."""

    TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")

    def __init__(self, pretrained: str = "openai/clip-vit-large-patch14", revision: str | None = None) -> None:
        """pretrained: hub id or folder, loaded on first use; RewardError if that fails."""
        self.pretrained, self.revision = pretrained, revision
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, picture: Tensor, things: Sequence[Thing]) -> list[str | None]:
        """See `Colours`."""
        if not things:
            return []
        clip = _clip(self.pretrained, self.revision)
        clip.model.to(picture.device)
        pixels = torch.cat([clip.transform(crop(picture, thing)[None]) for thing in things])
        pictures = normalize(clip.embed_images(pixels), dim=-1)
        texts = torch.stack([self._embed_colours(clip, thing.name).to(pictures) for thing in things])
        best = torch.einsum("bd,bcd->bc", pictures, texts).argmax(dim=1)
        return [COLOURS[i] for i in best.tolist()]

    def _embed_colours(self, clip: ClipScore, name: str) -> Tensor:
        """(colours, D): normalised mean of the text embeddings of each colour's templates."""
        if name not in self._texts:
            sentences = [t.format(colour=colour, name=name) for colour in COLOURS for t in self.TEMPLATES]
            each = normalize(clip.embed_prompts(sentences), dim=-1).unflatten(0, (len(COLOURS), -1))
            self._texts[name] = normalize(each.mean(dim=1), dim=-1)
        return self._texts[name]


class HueColours:
    """Names the median colour by hue, saturation and value, without a model.

    Meant for drawings and tests: unlike CLIP, it is misled by the shadows and highlights of photographs.
    """

    HUES = ((15, "red"), (42, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (300, "purple"), (340, "pink"))
    """Upper bound of each hue in degrees; red continues after pink."""

    def __call__(self, picture: Tensor, things: Sequence[Thing]) -> list[str | None]:
        """See `Colours`."""
        return [self._name(*self._median(picture, thing).tolist()) for thing in things]

    def _median(self, picture: Tensor, thing: Thing) -> Tensor:
        """Median colour (3,) of the mask, or without one of the central half of the box, which is mostly object."""
        if thing.mask is not None and thing.mask.any():
            return picture[:, thing.mask.to(picture.device)].median(dim=1).values
        part = crop(picture, thing)
        h, w = part.shape[-2:]
        return part[:, h // 4 : h - h // 4, w // 4 : w - w // 4].flatten(1).median(dim=1).values

    def _name(self, red: float, green: float, blue: float) -> str | None:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        degrees = 360 * hue
        if value < 0.2:
            return "black"
        if saturation < 0.15:
            return "white" if value > 0.8 else None  # grey is not one of the ten colours
        name = next((name for end, name in self.HUES if degrees < end), "red")
        if name == "red" and saturation < 0.5 and value > 0.7:
            return "pink"
        return "brown" if name == "orange" and value < 0.7 else name
