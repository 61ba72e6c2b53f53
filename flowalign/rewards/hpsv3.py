"""Human preference for images of a prompt, by HPSv3 (arXiv:2508.03789): a Qwen2-VL 7B fine-tuned to rate images."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flowalign.rewards.base import RewardError
from flowalign.rewards.embedding import ModelReward
from flowalign.rewards.pixels import as_bytes
from flowalign.rewards.weights import build, build_mlp, fetch, load_config, load_tensors, load_tokenizer, strip_prefix

REWARD, IMAGE = "<|Reward|>", "<|image_pad|>"
PIXELS = 256 * 28 * 28
"""Every image is resized to about this many pixels."""
EMBEDDINGS = "language_model.embed_tokens.weight"


@dataclass(eq=False)
class HPSv3(ModelReward):
    """Mean of the predicted rating distribution, about -5 to 15, read at a special token.

    pretrained, file: the checkpoint; processor: configuration and tokenizer of the Qwen2-VL that it was trained from;
    question: a text file with {text_prompt} and <|Reward|>, by default the question that HPSv3 was trained with, read
    from its package; max_prompt_tokens: longer prompts are truncated.
    """

    pretrained: str = "MizzenAI/HPSv3"
    processor: str | None = "Qwen/Qwen2-VL-7B-Instruct"
    file: str = "HPSv3.safetensors"
    dtype: str = "bfloat16"
    batch_size: int = 8
    question: str | None = None
    max_prompt_tokens: int = 1024

    def load(self) -> nn.Module:
        path = fetch(self.pretrained, self.file, self.revision)
        state = load_tensors(path)
        network = _qwen2_vl(state)
        if EMBEDDINGS not in network:
            raise RewardError(f"{path} is not an HPSv3 checkpoint: it has no {EMBEDDINGS}.")
        config = load_config("Qwen2VLConfig", self.processor or self.pretrained, self._processor_revision)
        # The checkpoint keeps only the rows of the tokenizer and the reward token.
        config.text_config.vocab_size = len(network[EMBEDDINGS])

        def qwen2_vl() -> nn.Module:
            from transformers import Qwen2VLModel

            return Qwen2VLModel(config)

        vlm = build(qwen2_vl, network, self.weights_dtype, str(path))
        return nn.ModuleDict({"vlm": vlm, "head": build_mlp(strip_prefix(state, "rm_head."), str(path), nn.ReLU)})

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del metadata
        image_inputs = self._image_processor([as_bytes(picture) for picture in pictures], return_tensors="pt")
        image_tokens = image_inputs["image_grid_thw"].prod(dim=1) // self._image_processor.merge_size**2
        rows = [self._token_ids(prompt, int(number)) for prompt, number in zip(prompts, image_tokens, strict=True)]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        reward_position = (ids == self._reward_token_id).int().argmax(dim=1)
        vlm = self.model["vlm"]
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == vlm.config.image_token_id).int(),
            "pixel_values": image_inputs["pixel_values"].to(self.weights_dtype),
            "image_grid_thw": image_inputs["image_grid_thw"],
        }
        hidden = vlm(**{name: value.to(pictures.device) for name, value in inputs.items()}).last_hidden_state
        return self.model["head"](hidden[torch.arange(len(ids)), reward_position].float())[:, 0]

    @cached_property
    def _image_processor(self) -> Any:
        # The full processor of the model needs torchvision, for videos.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        vision = self.model["vlm"].config.vision_config
        return Qwen2VLImageProcessorPil(
            size={"shortest_edge": PIXELS, "longest_edge": PIXELS},
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
        )

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.processor or self.pretrained, self._processor_revision)
        tokenizer.add_tokens([REWARD], special_tokens=True)
        return tokenizer

    @cached_property
    def _reward_token_id(self) -> int:
        number, rows = self.tokenizer.convert_tokens_to_ids(REWARD), self.model["vlm"].config.text_config.vocab_size
        if number >= rows:
            raise RewardError(
                f"{self.name} has {rows} tokens, but with {self.processor} the token {REWARD} is number {number}: "
                "the tokenizer is not the one it was trained with."
            )
        return number

    @cached_property
    def _question(self) -> str:
        text = Path(self.question).expanduser().read_text() if self.question else published_question()
        if "{text_prompt}" not in text or text.count(REWARD) != 1:
            raise RewardError(f"the question of {self.name} needs {{text_prompt}} and one {REWARD}.")
        return text

    def _token_ids(self, prompt: str, image_tokens: int) -> Tensor:
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        self.warn_if_truncated(len(ids), self.max_prompt_tokens)
        if len(ids) > self.max_prompt_tokens:
            prompt = self.tokenizer.decode(ids[: self.max_prompt_tokens])
        prompt = prompt.replace("<|", "< |")  # no control tokens in prompts
        question = self._question.replace("{text_prompt}", prompt)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        ).replace(IMAGE, IMAGE * image_tokens)
        return torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])


def published_question() -> str:
    """The question that HPSv3 was trained with, parsed from the source of its package, whose imports are heavy."""
    package = find_spec("hpsv3")
    folders = [Path(folder) for folder in (package.submodule_search_locations or [])] if package else []
    source = next((f for folder in folders if (f := folder / "dataset" / "data_collator_qwen.py").is_file()), None)
    if source is None:
        raise RewardError("HPSv3's question is in its package: pip install --no-deps hpsv3, or give `question`.")
    texts = _string_constants(source.read_text())
    try:
        return texts["INSTRUCTION"] + texts["prompt_with_special_token"]
    except KeyError as error:
        raise RewardError(f"{source} does not hold {error}: give `question` as a file.") from error


def _string_constants(source: str) -> dict[str, str]:
    """String constants assigned at the top level of a module, by name."""
    return {
        target.id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _qwen2_vl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of Qwen2VLModel from a checkpoint of an older or a newer transformers."""
    newer = {f"model.{part}.": f"{part}." for part in ("visual", "language_model")}
    older = {"visual.": "visual.", "model.": "language_model."}
    prefixes = newer if any(key.startswith(tuple(newer)) for key in state) else older
    return {
        key.replace(theirs, ours, 1): value
        for key, value in state.items()
        for theirs, ours in prefixes.items()
        if key.startswith(theirs)
    }
