"""What rewards made of a network have in common, and those that compare a picture with its prompt."""

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
from flowalign.rewards.pixels import Pixels
from flowalign.rewards.weights import model_of, settings_of, tokenizer_of

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ModelReward(FrameReward):
    """A reward by a network, which is loaded when it is first used.

    pretrained: a hub id or a folder; processor: another one for tokenizer and picture sizes; device: null is where the
    pictures are; dtype: of the weights; batch_size: pictures a forward.
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
        """The network, frozen, on the CPU."""

    @abstractmethod
    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """One batch: pictures (b, 3, H, W) in [0, 1] on the network's device → (b,)."""

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
        # Rollouts may run under autocast, which would change the scores with the precision of the policy.
        with torch.autocast(pictures.device.type, enabled=False):
            for start in range(0, len(pictures), self.batch_size):
                part = slice(start, start + self.batch_size)
                found.append(self.judge(pictures[part], prompts[part], metadata[part]).float())
        return torch.cat(found)

    def self_check(self) -> None:
        """RewardError if weights cannot be loaded, or do not prefer a drawing of the caption (see `check_matching`)."""
        check_matching(self, self.name, self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def where(self) -> torch.device:
        """Of the network, which follows the pictures."""
        return next(self.model.parameters()).device

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    @cached_property
    def pixels(self) -> Pixels:
        source = self.processor or self.pretrained
        return Pixels.of(settings_of(source, "preprocessor_config.json", self._processor_revision), source)

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processor or self.pretrained, self._processor_revision)

    @property
    def _processor_revision(self) -> str | None:
        return self.revision if self.processor is None else None  # a revision of one repository names none of another

    def tokens(self, prompts: list[str], limit: int) -> dict[str, Tensor]:
        """(b, limit) each, padded to the same length always, so that no score depends on its neighbours.

        Says once if a prompt is longer and therefore cut.
        """
        longest = max(len(ids) for ids in self.tokenizer(prompts, verbose=False)["input_ids"])
        self.say_if_cut(longest, limit)
        encoded = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt", verbose=False
        )
        return {name: encoded[name].to(self.where) for name in ("input_ids", "attention_mask") if name in encoded}

    def say_if_cut(self, length: int, limit: int) -> None:
        """A warning, once, if a text of so many tokens is too long."""
        if length > limit and "_said" not in self.__dict__:
            self._said = True
            log.warning("%s reads %d tokens of a prompt; longer ones (here %d) are cut.", self.name, limit, length)


@dataclass(eq=False)
class TextImage(ModelReward):
    """Cosine between the embeddings of picture and prompt, in [-1, 1], by a model with CLIP's parts."""

    def load(self) -> nn.Module:
        return model_of("CLIPModel", self.pretrained, self.revision, self.weights_dtype)

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del metadata
        different = list(dict.fromkeys(prompts))  # a group shares its prompt
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=pictures.device)
        of_text = normalize(self.of_prompts(different).float(), dim=-1)[rows]
        of_pictures = normalize(self.of_pictures(self.pixels(pictures).to(self.weights_dtype)).float(), dim=-1)
        return (of_text * of_pictures).sum(dim=-1)

    def of_pictures(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) → (b, D)."""
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def of_prompts(self, prompts: list[str]) -> Tensor:
        """→ (b, D)."""
        tokens = self.tokens(prompts, self.model.config.text_config.max_position_embeddings)
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output)
