"""Object detectors for GenEval: closed-set (Mask2Former, DETR) and open-vocabulary (OWLv2, Grounding DINO)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowalign.rewards.base import RewardError
from flowalign.rewards.geneval_rules import Thing
from flowalign.rewards.pixels import ImageTransform, Triple, as_bytes
from flowalign.rewards.weights import cached, load_json, load_model, load_processor

_MIN_SCORE = 0.05  # less confident detections are dropped at once; no rule would keep them
_STRIDE = 32  # height and width are multiples of it, so that no network has to pad
COCO = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "hair dryer": "hair drier"}
"""COCO classes that have another name in GenEval."""


class Detector(Protocol):
    """Protocol of detectors; any object with these two members will do."""

    @property
    def vocabulary(self) -> Collection[str] | None:
        """The classes that it knows; None for an open vocabulary."""
        ...

    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> Sequence[Sequence[Thing] | None]:
        """Detect objects in images (N, 3, H, W) in [0, 1], given the classes that matter in each.

        None for an image that could not be processed: it scores NaN. Objects of other classes are ignored.
        """
        ...


@cached(maxsize=4)
def _network(kind: str, pretrained: str, revision: str | None) -> Any:
    """The network, shared by all rewards that use it."""
    return load_model(kind, pretrained, revision, torch.float32)


class _ClosedSetDetector:
    """Base class for detectors with a fixed list of classes; the network is loaded on first use."""

    MODEL: str

    def __init__(self, pretrained: str, revision: str | None, side: int, batch_size: int) -> None:
        """pretrained: hub id or folder; side: shorter side of the network's input in pixels."""
        if side < _STRIDE or batch_size < 1:
            raise ValueError(f"side must be at least {_STRIDE} and batch_size at least 1 (got {side}, {batch_size}).")
        self.pretrained, self.revision, self.side, self.batch_size = pretrained, revision, side, batch_size

    @cached_property
    def model(self) -> Any:
        return _network(self.MODEL, self.pretrained, self.revision)

    @cached_property
    def labels(self) -> list[str]:
        """Class names by index, as GenEval calls them."""
        known: dict[int, str] = self.model.config.id2label
        words = [known[i].lower() for i in sorted(known)]
        return [COCO.get(word, word) for word in words]

    @property
    def vocabulary(self) -> frozenset[str]:
        return frozenset(self.labels)

    @torch.no_grad()
    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> list[list[Thing]]:
        """See `Detector`."""
        self.model.to(pictures.device)
        found: list[list[Thing]] = []
        for start in range(0, len(pictures), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._detect_batch(pictures[part], names[part])
        return found

    def _detect_batch(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> Iterator[list[Thing]]:
        raise NotImplementedError

    def _preprocess(self, pictures: Tensor) -> Tensor:
        """Resize the shorter side to `side` and normalise, as in training of the network."""
        factor = self.side / min(pictures.shape[-2:])
        height, width = (max(round(edge * factor / _STRIDE), 1) * _STRIDE for edge in pictures.shape[-2:])
        return ImageTransform(
            (height, width), "stretch", mean=self._normalisation[0], std=self._normalisation[1], mode="bilinear"
        )(pictures)

    @cached_property
    def _normalisation(self) -> tuple[Triple, Triple]:
        """Mean and standard deviation of the network's training data."""
        found = load_json(self.pretrained, "preprocessor_config.json", self.revision)
        try:
            (a, b, c), (d, e, f) = found["image_mean"], found["image_std"]
        except (KeyError, ValueError) as error:
            raise RewardError(
                f"the preprocessor_config.json of {self.pretrained} has no image_mean and std."
            ) from error
        return (a, b, c), (d, e, f)


class Segmenter(_ClosedSetDetector):
    """Mask2Former (arXiv:2112.01527) for COCO instance segmentation, the kind of detector that the benchmark uses."""

    MODEL = "Mask2FormerForUniversalSegmentation"

    def __init__(
        self,
        pretrained: str = "facebook/mask2former-swin-small-coco-instance",
        revision: str | None = None,
        side: int = 800,
        batch_size: int = 8,
        most: int = 100,
    ) -> None:
        """most: maximum number of objects per image."""
        super().__init__(pretrained, revision, side, batch_size)
        self.most = most

    def _detect_batch(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> Iterator[list[Thing]]:
        output = self.model(pixel_values=self._preprocess(pictures))
        shares = output.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last one is "nothing"
        for logits, share, wanted in zip(output.masks_queries_logits, shares, names, strict=True):
            yield self._things(logits, share, pictures.shape[-2:], wanted)

    def _things(self, logits: Tensor, share: Tensor, size: Sequence[int], wanted: Sequence[str]) -> list[Thing]:
        """Objects from mask logits (Q, h, w) and class probabilities (Q, classes).

        A query may yield several classes, as in the original. Full-size masks are made for wanted classes only.
        """
        best, which = share.flatten().topk(min(self.most, share.numel()))
        best, which = best[best > _MIN_SCORE], which[best > _MIN_SCORE]
        things = []
        for confidence, index in zip(best.tolist(), which.tolist(), strict=True):
            query, label = divmod(index, share.shape[1])
            if self.labels[label] not in wanted:
                continue
            upright = interpolate(logits[query][None, None], tuple(size), mode="bilinear")[0, 0]
            mask = upright > 0
            if mask.any():
                score = confidence * float(upright[mask].sigmoid().mean())
                things.append(Thing(self.labels[label], _bounding_box(mask), score, mask))
        return things


def _bounding_box(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = (mask.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


class BoxDetector(_ClosedSetDetector):
    """DETR (arXiv:2005.12872) trained on COCO: boxes without masks."""

    MODEL = "DetrForObjectDetection"

    def __init__(
        self,
        pretrained: str = "facebook/detr-resnet-50",
        revision: str | None = None,
        side: int = 800,
        batch_size: int = 8,
    ) -> None:
        super().__init__(pretrained, revision, side, batch_size)

    def _detect_batch(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> Iterator[list[Thing]]:
        output = self.model(pixel_values=self._preprocess(pictures))
        scores, labels = output.logits.softmax(dim=-1)[..., :-1].max(dim=-1)  # the last one is "nothing"
        height, width = pictures.shape[-2:]
        middle, half = output.pred_boxes[..., :2], output.pred_boxes[..., 2:] / 2  # relative to the image size
        boxes = torch.cat([middle - half, middle + half], dim=-1) * middle.new_tensor([width, height] * 2)
        for box, score, label, wanted in zip(boxes, scores, labels, names, strict=True):
            things = _things(box, score, label, self.labels)
            yield [thing for thing in things if thing.score > _MIN_SCORE and thing.name in wanted]


class WordDetector:
    """Open-vocabulary boxes by OWLv2 (arXiv:2306.09683) or Grounding DINO (arXiv:2303.05499).

    Each class is searched for separately, so that its boxes cannot get the name of another class. This takes one
    forward pass per image and class.
    """

    MODEL = "AutoModelForZeroShotObjectDetection"
    vocabulary = None

    def __init__(
        self,
        pretrained: str = "google/owlv2-base-patch16-ensemble",
        revision: str | None = None,
        sentence: str | None = None,
        batch_size: int = 4,
    ) -> None:
        """sentence: text template with {name}; None for the family's own: "a photo of a {name}" or "{name}."."""
        if sentence is not None and "{name}" not in sentence:
            raise ValueError(f"sentence needs {{name}} where the class goes (got {sentence!r}).")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (got {batch_size}).")
        self.pretrained, self.revision, self.batch_size = pretrained, revision, batch_size
        self._sentence = sentence

    @cached_property
    def model(self) -> Any:
        return _network(self.MODEL, self.pretrained, self.revision)

    @cached_property
    def processor(self) -> Any:
        return load_processor(self.pretrained, self.revision)

    @property
    def is_owl(self) -> bool:
        return self.model.config.model_type.startswith("owl")

    @property
    def sentence(self) -> str:
        return self._sentence or ("a photo of a {name}" if self.is_owl else "{name}.")

    @torch.no_grad()
    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> list[list[Thing]]:
        """See `Detector`."""
        self.model.to(pictures.device)
        pairs = [(i, name) for i, wanted in enumerate(names) for name in wanted]
        found: list[list[Thing]] = [[] for _ in range(len(pictures))]
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            results = self._detect_batch(pictures[[i for i, _ in part]], [name for _, name in part])
            for (i, name), result in zip(part, results, strict=True):
                every = torch.zeros_like(result["scores"], dtype=torch.long)
                found[i] += _things(result["boxes"], result["scores"], every, [name])
        return found

    def _detect_batch(self, pictures: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        arrays = [as_bytes(picture) for picture in pictures]
        sentences = [self.sentence.format(name=name) for name in names]
        text = [[sentence] for sentence in sentences] if self.is_owl else sentences
        inputs = self.processor(
            images=arrays, text=text, return_tensors="pt", padding=True, input_data_format="channels_last"
        ).to(pictures.device)
        output, sizes = self.model(**inputs), [tuple(pictures.shape[-2:])] * len(pictures)
        read = self.processor.post_process_grounded_object_detection
        if self.is_owl:
            return read(output, threshold=_MIN_SCORE, target_sizes=sizes)
        return read(output, inputs["input_ids"], threshold=_MIN_SCORE, text_threshold=_MIN_SCORE, target_sizes=sizes)


def _things(boxes: Tensor, scores: Tensor, labels: Tensor, names: list[str]) -> Iterator[Thing]:
    """Objects from boxes (n, 4) in pixels, scores (n,) and labels (n,), indices into `names`."""
    for (left, top, right, bottom), score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
        yield Thing(names[label], (left, top, right, bottom), score)
