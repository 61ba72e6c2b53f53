"""Conversion of open_clip weights to transformers' CLIPModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

ENDS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' spelling
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
"""(width, D) in open_clip, (D, width) in transformers."""
BLOCKS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a CLIPModel. KeyError names a tensor without a counterpart there."""
    return {name: tensor for key, value in state.items() for name, tensor in _renamed(key, value)}


def _renamed(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if key in PROJECTIONS:
        yield PROJECTIONS[key], value.T.contiguous()
        return
    for theirs, ours in BLOCKS.items():
        if key.startswith(f"{theirs}."):
            number, _, part = key.removeprefix(f"{theirs}.").partition(".")
            yield from _renamed_in_block(f"{ours}.{number}", part, value)
            return
    stem, kind = (key, "") if key in ENDS else key.rsplit(".", 1)
    yield ENDS[stem] + (f".{kind}" if kind else ""), value


def _renamed_in_block(block: str, part: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if part.startswith("attn.in_proj_"):  # queries, keys and values in one tensor
        kind = part.removeprefix("attn.in_proj_")
        for letter, third in zip("qkv", value.chunk(3), strict=True):
            yield f"{block}.self_attn.{letter}_proj.{kind}", third.clone()
        return
    stem, kind = part.rsplit(".", 1)
    yield f"{block}.{PARTS[stem]}.{kind}", value
