"""Folders of small random reward models, laid out as the published ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.drawings import SCENES, drawings
from flowalign.rewards.embedding import TextImage
from tests.models.tiny.parts import clip_config, clip_tokenizer, seeded

PICTURES = torch.rand(5, 3, 40, 48, generator=torch.Generator().manual_seed(1))
PROMPTS = ["a cat", "two dogs", "a cat", "a red square", "the sea at night"]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def called(reward: Any, pictures: Tensor = PICTURES, prompts: list[str] = PROMPTS, **entry: Any) -> Tensor:
    """Scores of pictures with these prompts and the same metadata each."""
    return reward(pictures, prompts[: len(pictures)], [dict(entry) for _ in range(len(pictures))])


def write_processor(folder: Path, **settings: Any) -> None:
    """A preprocessor_config.json as CLIP has it."""
    clip = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    rest = {"resample": 3, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps({**clip, **rest, **settings}))


def clip_parts(**vision: Any) -> Any:
    """The configuration of a CLIP of width 32 for pictures of 32 pixels."""
    from transformers import CLIPConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    eyes = {**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 24, **vision}
    text = {**clip_config().to_dict(), "projection_dim": 24}
    return CLIPConfig(text_config=text, vision_config=eyes, projection_dim=24)


def clip(folder: Path) -> Path:
    """CLIP with tokenizer and processor."""
    from transformers import CLIPModel

    seeded(CLIPModel, clip_parts()).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    write_processor(folder)
    return folder


def siglip(folder: Path) -> Path:
    """SigLIP with tokenizer and processor."""
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 514, "max_position_embeddings": 64, "projection_size": 32}
    eyes = {**sizes, "image_size": 32, "patch_size": 8}
    seeded(SiglipModel, SiglipConfig(text_config=text, vision_config=eyes)).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    write_processor(folder, do_center_crop=False, size={"height": 32, "width": 32}, resample=2)
    return folder


@torch.no_grad()
def rig_text(reward: TextImage) -> None:
    """Makes the embedding of every caption of the drawings that of its drawing, by the last layer of the text."""
    model = reward.model
    last = model.text_projection if hasattr(model, "text_projection") else model.text_model.head
    inputs: list[Tensor] = []
    hook = last.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    reward.embed_prompts(list(SCENES))
    hook.remove()
    last.weight.copy_(solved(inputs[0], reward.embed_images(reward.transform(drawings()))))
    if last.bias is not None:
        last.bias.zero_()


def solved(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The smallest weight (out, in) of a linear layer that maps these rows to those."""
    return torch.linalg.lstsq(inputs.double(), outputs.double()).solution.T.float()
