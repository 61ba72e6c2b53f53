"""Human preference for images of a prompt, by ImageReward (arXiv:2304.05977): BLIP with an MLP head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowalign.rewards.base import RewardError
from flowalign.rewards.embedding import ModelReward
from flowalign.rewards.pixels import ImageTransform
from flowalign.rewards.weights import build, build_mlp, fetch, load_tensors, strip_prefix

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Statistics of the raw rewards on the authors' data."""
HEAD_WIDTH = 64
"""Width of an attention head in ViT and BERT of every size; the one dimension that the weights do not reveal."""
LENGTH = 35
"""Maximum number of tokens of a prompt."""
VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(eq=False)
class ImageReward(ModelReward):
    """Standardised score, about -2 to 2. processor: hub id or folder with the tokenizer of uncased BERT."""

    pretrained: str = "zai-org/ImageReward"
    processor: str | None = "google-bert/bert-base-uncased"
    file: str = "ImageReward.pt"

    def load(self) -> nn.Module:
        path = fetch(self.pretrained, self.file, self.revision)
        state = load_tensors(path)
        source, dtype = str(path), self.weights_dtype
        vision, text = strip_prefix(state, "blip.visual_encoder."), strip_prefix(state, "blip.text_encoder.")
        text.pop("embeddings.position_ids", None)  # a constant buffer, not a weight
        try:
            vision_model = build(lambda: _vision_model(vision), _to_transformers(vision), dtype, source)
            text_model = build(lambda: _text_model(text), text, dtype, source)
        except KeyError as error:
            raise RewardError(f"{path} is not an ImageReward checkpoint: {error} is missing or unexpected.") from error
        head = build_mlp(strip_prefix(state, "mlp.layers."), source)
        return nn.ModuleDict({"vision": vision_model, "text": text_model, "head": head})

    def judge(self, pictures: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        del metadata
        side = self.model["vision"].config.image_size
        pixels = ImageTransform((side, side), "shortest", (side, side))(pictures).to(self.weights_dtype)
        image_states = self.model["vision"](pixel_values=pixels).last_hidden_state
        pooled = self.model["text"](
            **self.tokens(prompts, LENGTH),
            encoder_hidden_states=image_states,
            encoder_attention_mask=torch.ones(image_states.shape[:2], dtype=torch.long, device=image_states.device),
        ).last_hidden_state[:, 0]
        return (self.model["head"](pooled.float())[:, 0] - MEAN) / STD


def _to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the authors' vision weights to keys of BlipVisionModel. KeyError names a key without a counterpart."""
    found = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, number, part = key.split(".", 2)
            stem, kind = part.rsplit(".", 1)
            found[f"encoder.layers.{number}.{BLOCK[stem]}.{kind}"] = value
        elif key in VISION:
            found[VISION[key]] = value
        else:
            stem, kind = key.rsplit(".", 1)
            found[f"{VISION[stem]}.{kind}"] = value
    return found


def _num_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def _vision_model(state: Mapping[str, Tensor]) -> nn.Module:
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    return BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_num_layers(state, "blocks."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=side,
            patch_size=patch,
            layer_norm_eps=1e-6,  # as in the authors' vision transformer; transformers' default differs
        )
    )


def _text_model(state: Mapping[str, Tensor]) -> nn.Module:
    from transformers import BlipTextConfig, BlipTextModel

    words, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextModel(
        BlipTextConfig(
            vocab_size=words,
            hidden_size=width,
            encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_num_layers(state, "encoder.layer."),
            num_attention_heads=width // HEAD_WIDTH,
            max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
            is_decoder=True,  # enables cross-attention; self-attention stays bidirectional
        ),
        add_pooling_layer=False,
    )
