"""Base classes of rewards that load a network, and of those that compare an image with its prompt."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flowalign.dtypes import torch_dtype
from flowalign.rewards.base import FrameReward
from flowalign.rewards.drawings import check_matching
from flowalign.rewards.pixels import ImageTransform
from flowalign.rewards.weights import load_json, load_model, load_tokenizer

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ModelReward(FrameReward):
    """Base class for rewards computed by a network, which is loaded on first use.

    pretrained: hub id or folder; processor: hub id or folder of tokenizer and image processor, if different; device:
    null for the device of the images; dtype: of the weights; batch_size: images per forward pass.
    """

    pretrained: str
    processor: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: str = "float32"
    batch_size: int = 16

    def __post_init__(self) -> None:
        torch_dtype(self.dtype)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (got {self.batch_size}).")

    @abstractmethod
    def load(self) -> nn.Module:
        """Load the network, frozen, on the CPU."""

    @abstractmethod
    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Score one batch of images (b, 3, H, W) in [0, 1] on the network's device → (b,)."""

    @cached_property
    def model(self) -> Any:
        return self.load()

    @property
    def name(self) -> str:
        return f"{type(self).__name__} ({self.pretrained})"

    @torch.no_grad()
    def score(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        pictures = pictures.to(self.device or pictures.device)
        self.model.to(pictures.device)
        found = []
        # Rollouts may run under autocast; scores must not depend on the precision of the policy.
        with torch.autocast(pictures.device.type, enabled=False):
            for start in range(0, len(pictures), self.batch_size):
                part = slice(start, start + self.batch_size)
                found.append(self.judge(pictures[part], prompts[part], metadata[part]).float())
        return torch.cat(found)

    def self_check(self) -> None:
        """Raise RewardError if the weights cannot be loaded or fail `check_matching`."""
        check_matching(self, self.name, self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def model_device(self) -> torch.device:
        """Device of the network, which is moved to that of the images."""
        return next(self.model.parameters()).device

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    @cached_property
    def transform(self) -> ImageTransform:
        source = self.processor or self.pretrained
        return ImageTransform.from_config(
            load_json(source, "preprocessor_config.json", self._processor_revision), source
        )

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.processor or self.pretrained, self._processor_revision)

    @property
    def _processor_revision(self) -> str | None:
        return self.revision if self.processor is None else None  # a revision is valid in one repository only

    def tokens(self, prompts: list[str], limit: int) -> dict[str, Tensor]:
        """Tokenize into (b, limit) each, always padded to `limit`, so that no score depends on the rest of its batch.

        Longer prompts are truncated, with one warning.
        """
        longest = max(len(ids) for ids in self.tokenizer(prompts, verbose=False)["input_ids"])
        self.warn_if_truncated(longest, limit)
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt", verbose=False
        )
        return {
            name: encoded[name].to(self.model_device) for name in ("input_ids", "attention_mask") if name in encoded
        }

    def warn_if_truncated(self, length: int, limit: int) -> None:
        """Warn, once, if a text of `length` tokens exceeds the limit."""
        if length > limit and "_warned" not in self.__dict__:
            self._warned = True
            log.warning(
                "%s reads %d tokens of a prompt; longer ones (here %d) are truncated.", self.name, limit, length
            )


@dataclass(eq=False)
class TextImage(ModelReward):
    """Cosine similarity in [-1, 1] of the image and text embeddings of a CLIP-like model."""

    def load(self) -> nn.Module:
        return load_model("CLIPModel", self.pretrained, self.revision, self.weights_dtype)

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del metadata
        unique = list(dict.fromkeys(prompts))  # a group shares its prompt
        rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=pictures.device)
        text = normalize(self.embed_prompts(unique).float(), dim=-1)[rows]
        image = normalize(self.embed_images(self.transform(pictures).to(self.weights_dtype)).float(), dim=-1)
        return (text * image).sum(dim=-1)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed preprocessed images (b, 3, h, w) → (b, D)."""
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Embed prompts → (b, D)."""
        tokens = self.tokens(prompts, self.model.config.text_config.max_position_embeddings)
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output)
