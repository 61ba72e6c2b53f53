"""Who says what is where: networks of a fixed list of classes (Mask2Former, DETR), and ones that look for any words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowalign.rewards.geneval_rules import Thing
from flowalign.rewards.weights import opened

_FLOOR = 0.05  # of confidence: what no rule would ever keep is not carried along
_STRIDE = 32  # sides are multiples of it, so that no network has to pad
COCO = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "hair dryer": "hair drier"}
"""GenEval's words for classes of COCO that have others there."""


class Detector(Protocol):
    """Finds things in pictures. Whatever has these two members will do."""

    @property
    def vocabulary(self) -> Collection[str] | None:
        """The classes that it knows; None = any words."""
        ...

    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> Sequence[Sequence[Thing] | None]:
        """pictures (N, 3, H, W) in [0, 1], and the classes that matter in each → the things of each.

        None for a picture that could not be looked at: it scores NaN. More classes than asked for do no harm.
        """
        ...


class _Closed:
    """A network that was trained on a fixed list of classes."""

    MODEL: str

    def __init__(self, pretrained: str, side: int = 800, batch_size: int = 8) -> None:
        """pretrained: hub id or folder; side: of what the network sees, the shorter one, in pixels."""
        if side < _STRIDE or batch_size < 1:
            raise ValueError(f"side must be at least {_STRIDE} and batch_size at least 1 (got {side}, {batch_size}).")
        self.model, self.processor = opened(self.MODEL, "AutoImageProcessor", pretrained)
        self.side, self.batch_size = side, batch_size
        self.labels = [self._named(self.model.config.id2label[i]) for i in sorted(self.model.config.id2label)]
        self.vocabulary = frozenset(self.labels)

    @torch.no_grad()
    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> list[list[Thing]]:
        """See `Detector`."""
        del names  # it says all that it knows
        self.model.to(pictures.device)
        return [found for part in pictures.split(self.batch_size) for found in self._look(part)]

    def _look(self, pictures: Tensor) -> Iterator[list[Thing]]:
        raise NotImplementedError

    def _prepared(self, pictures: Tensor) -> Tensor:
        """As the network was trained to see them: the shorter side scaled to `side`, the colours normalised."""
        factor = self.side / min(pictures.shape[-2:])
        size = [max(round(edge * factor / _STRIDE), 1) * _STRIDE for edge in pictures.shape[-2:]]
        scaled = interpolate(pictures, size, mode="bilinear", antialias=True).clamp(0, 1)
        if not self.processor.do_normalize:
            return scaled
        mean, std = (scaled.new_tensor(v)[:, None, None] for v in (self.processor.image_mean, self.processor.image_std))
        return (scaled - mean) / std

    @staticmethod
    def _named(label: str) -> str:
        return COCO.get(label.lower(), label.lower())


class Segmenter(_Closed):
    """Mask2Former (arXiv:2112.01527), trained for instances of COCO: the benchmark's kind of detector, with masks."""

    MODEL = "Mask2FormerForUniversalSegmentation"

    def __init__(
        self,
        pretrained: str = "facebook/mask2former-swin-small-coco-instance",
        side: int = 800,
        batch_size: int = 8,
        most: int = 100,
    ) -> None:
        """most: things of a picture."""
        super().__init__(pretrained, side, batch_size)
        self.most = most

    def _look(self, pictures: Tensor) -> Iterator[list[Thing]]:
        output = self.model(pixel_values=self._prepared(pictures))
        shares = output.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last one is "nothing"
        for logits, share in zip(output.masks_queries_logits, shares, strict=True):
            yield self._things(logits, share, pictures.shape[-2:])

    def _things(self, logits: Tensor, share: Tensor, size: Sequence[int]) -> list[Thing]:
        """logits (Q, h, w) of masks, share (Q, classes): a query may be of several classes, as in the original."""
        best, which = share.flatten().topk(min(self.most, share.numel()))
        best, which = best[best > _FLOOR], which[best > _FLOOR]
        things = []
        for confidence, index in zip(best.tolist(), which.tolist(), strict=True):
            query, label = divmod(index, share.shape[1])
            upright = interpolate(logits[query][None, None], tuple(size), mode="bilinear")[0, 0]
            mask = upright > 0
            if mask.any():
                score = confidence * float(upright[mask].sigmoid().mean())
                things.append(Thing(self.labels[label], _around(mask), score, mask))
        return things


def _around(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = (mask.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


class BoxDetector(_Closed):
    """DETR (arXiv:2005.12872) and its kin, trained on COCO: boxes, no masks."""

    MODEL = "AutoModelForObjectDetection"

    def __init__(self, pretrained: str, side: int = 800, batch_size: int = 8) -> None:
        super().__init__(pretrained, side, batch_size)

    def _look(self, pictures: Tensor) -> Iterator[list[Thing]]:
        output = self.model(pixel_values=self._prepared(pictures))
        sizes = [tuple(pictures.shape[-2:])] * len(pictures)
        for found in self.processor.post_process_object_detection(output, threshold=_FLOOR, target_sizes=sizes):
            yield list(_boxed(found, [self.labels[i] for i in found["labels"].tolist()]))


class WordDetector:
    """OWLv2 (arXiv:2306.09683) or Grounding DINO (arXiv:2303.05499): boxes of whatever words name.

    Each class is looked for on its own, so that one word's boxes never go by another's name; a picture is therefore
    looked at once for each of its classes.
    """

    vocabulary = None

    def __init__(
        self, pretrained: str = "google/owlv2-base-patch16-ensemble", sentence: str = "", batch_size: int = 4
    ) -> None:
        """sentence: around the class, with {name}; "" is the family's own: "a photo of a {name}", or "{name}."."""
        self.model, self.processor = opened("AutoModelForZeroShotObjectDetection", "AutoProcessor", pretrained)
        self.owl = self.model.config.model_type.startswith("owl")
        self.sentence = sentence or ("a photo of a {name}" if self.owl else "{name}.")
        if "{name}" not in self.sentence:
            raise ValueError(f"sentence needs {{name}} where the class goes (got {sentence!r}).")
        self.batch_size = batch_size

    @torch.no_grad()
    def detect(self, pictures: Tensor, names: Sequence[Sequence[str]]) -> list[list[Thing]]:
        """See `Detector`."""
        self.model.to(pictures.device)
        pairs = [(i, name) for i, wanted in enumerate(names) for name in wanted]
        found: list[list[Thing]] = [[] for _ in range(len(pictures))]
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            results = self._look(pictures[[i for i, _ in part]], [name for _, name in part])
            for (i, name), result in zip(part, results, strict=True):
                found[i] += _boxed(result, [name] * len(result["scores"]))
        return found

    def _look(self, pictures: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
        arrays = [(p * 255).round().byte().permute(1, 2, 0).cpu().numpy() for p in pictures]
        sentences = [self.sentence.format(name=name) for name in names]
        text = [[sentence] for sentence in sentences] if self.owl else sentences
        inputs = self.processor(
            images=arrays, text=text, return_tensors="pt", padding=True, input_data_format="channels_last"
        ).to(pictures.device)
        output, sizes = self.model(**inputs), [tuple(pictures.shape[-2:])] * len(pictures)
        read = self.processor.post_process_grounded_object_detection
        if self.owl:
            return read(output, threshold=_FLOOR, target_sizes=sizes)
        return read(output, inputs["input_ids"], threshold=_FLOOR, text_threshold=_FLOOR, target_sizes=sizes)


def _boxed(found: dict[str, Any], names: Sequence[str]) -> Iterator[Thing]:
    for box, score, name in zip(found["boxes"].tolist(), found["scores"].tolist(), names, strict=True):
        left, top, right, bottom = box
        yield Thing(name, (left, top, right, bottom), score)
