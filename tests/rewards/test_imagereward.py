"""ImageReward: the network of BLIP's authors, from their weights' names, beside the converted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from flowalign.rewards.base import RewardError
from flowalign.rewards.drawings import SCENES, drawings, noise
from flowalign.rewards.imagereward import LENGTH, MEAN, STD, ImageReward
from tests.rewards.tiny import PICTURES, PROMPTS, called, solved

SEE, READ, HEADS, LAYERS, PATCH, SIDE = 128, 64, {128: 2, 64: 1}, 2, 8, 32
LETTERS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
LETTERS += [f"##{letter}" for letter in LETTERS[5:]]
EYES, EARS = "blip.visual_encoder", "blip.text_encoder"


def weights() -> dict[str, Tensor]:
    """A random ImageReward with its authors' names and shapes."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def some(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    def layer(name: str, into: int, out: int) -> None:
        state.update({f"{name}.weight": some(out, into), f"{name}.bias": some(out)})

    def norm(name: str, width: int) -> None:
        state.update({f"{name}.weight": 1 + some(width), f"{name}.bias": some(width)})

    state[f"{EYES}.cls_token"] = some(1, 1, SEE)
    state[f"{EYES}.pos_embed"] = some(1, (SIDE // PATCH) ** 2 + 1, SEE)
    state |= {f"{EYES}.patch_embed.proj.weight": some(SEE, 3, PATCH, PATCH), f"{EYES}.patch_embed.proj.bias": some(SEE)}
    for number in range(LAYERS):
        block = f"{EYES}.blocks.{number}"
        for part, into, out in (
            ("attn.qkv", SEE, 3 * SEE),
            ("attn.proj", SEE, SEE),
            ("mlp.fc1", SEE, 96),
            ("mlp.fc2", 96, SEE),
        ):
            layer(f"{block}.{part}", into, out)
        norm(f"{block}.norm1", SEE)
        norm(f"{block}.norm2", SEE)
    norm(f"{EYES}.norm", SEE)
    state[f"{EARS}.embeddings.word_embeddings.weight"] = some(len(LETTERS) + 2, READ)
    state[f"{EARS}.embeddings.position_embeddings.weight"] = some(40, READ)
    state[f"{EARS}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{EARS}.embeddings.LayerNorm", READ)
    for number in range(LAYERS):
        block = f"{EARS}.encoder.layer.{number}"
        for kind, width in (("attention", READ), ("crossattention", SEE)):
            layer(f"{block}.{kind}.self.query", READ, READ)
            layer(f"{block}.{kind}.self.key", width, READ)
            layer(f"{block}.{kind}.self.value", width, READ)
            layer(f"{block}.{kind}.output.dense", READ, READ)
            norm(f"{block}.{kind}.output.LayerNorm", READ)
        layer(f"{block}.intermediate.dense", READ, 96)
        layer(f"{block}.output.dense", 96, READ)
        norm(f"{block}.output.LayerNorm", READ)
    layer("blip.vision_proj", SEE, 8)  # in the published file, of no use
    for number, (into, out) in zip((0, 2, 4, 6, 7), ((READ, 48), (48, 32), (32, 16), (16, 8), (8, 1)), strict=True):
        layer(f"mlp.layers.{number}", into, out)
    return state


class Authors:
    """ViT and BERT with cross-attention, written out; nothing of transformers, nothing of our conversion."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def layer(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS[q.shape[-1]], -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / 8  # 64 wide
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    def see(self, pixels: Tensor) -> Tensor:
        x = conv2d(
            pixels, self.state[f"{EYES}.patch_embed.proj.weight"], self.state[f"{EYES}.patch_embed.proj.bias"], PATCH
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.state[f"{EYES}.cls_token"].expand(len(x), -1, -1), x], 1) + self.state[f"{EYES}.pos_embed"]
        for number in range(LAYERS):
            block = f"{EYES}.blocks.{number}"
            q, k, v = self.layer(self.norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
            x = x + self.layer(self.attention(q, k, v), f"{block}.attn.proj")
            y = gelu(self.layer(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.layer(y, f"{block}.mlp.fc2")
        return self.norm(x, f"{EYES}.norm", 1e-6)

    def attend(self, x: Tensor, name: str, other: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self.layer(y, f"{name}.self.{kind}") for y, kind in ((x, "query"), (other, "key"), (other, "value")))
        y = self.layer(self.attention(q, k, v, mask), f"{name}.output.dense")
        return self.norm(x + y, f"{name}.output.LayerNorm", 1e-12)

    def rate(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.see(pixels)
        words, places = (self.state[f"{EARS}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        x = self.norm(words[ids] + places[: ids.shape[1]], f"{EARS}.embeddings.LayerNorm", 1e-12)
        for number in range(LAYERS):
            block = f"{EARS}.encoder.layer.{number}"
            x = self.attend(x, f"{block}.attention", x, mask)
            x = self.attend(x, f"{block}.crossattention", seen, None)
            y = self.layer(gelu(self.layer(x, f"{block}.intermediate.dense")), f"{block}.output.dense")
            x = self.norm(x + y, f"{block}.output.LayerNorm", 1e-12)
        x = x[:, 0]
        for number in (0, 2, 4, 6, 7):
            x = self.layer(x, f"mlp.layers.{number}")
        return (x[:, 0] - MEAN) / STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("imagereward")
    BertTokenizer(vocab={letter: i for i, letter in enumerate(LETTERS)}).save_pretrained(folder)
    torch.save(weights(), folder / "ImageReward.pt")
    return str(folder)


def test_the_converted_network_is_the_one_of_its_authors(folder: str):
    reward = ImageReward(folder, processor=None)
    scores = called(reward)  # loads it
    words = reward.tokens(PROMPTS, LENGTH)
    from flowalign.rewards.pixels import ImageTransform

    pixels = ImageTransform((SIDE, SIDE), "shortest", (SIDE, SIDE))(PICTURES)
    expected = Authors(weights()).rate(pixels, words["input_ids"], words["attention_mask"])
    assert expected.std() > 0
    assert scores.allclose(expected, atol=1e-5)


def test_batches_do_not_matter_and_long_prompts_are_cut(folder: str, caplog: pytest.LogCaptureFixture):
    whole = called(ImageReward(folder, processor=None))
    assert called(ImageReward(folder, processor=None, batch_size=2)).allclose(whole, rtol=1e-5, atol=1e-6)
    reward = ImageReward(folder, processor=None)
    assert called(reward, prompts=["x" * 40] * 5).equal(called(reward, prompts=["x" * 60] * 5))
    assert [r.getMessage() for r in caplog.records if "reads 35 tokens" in r.getMessage()].__len__() == 1


def test_self_check(folder: str):
    reward = ImageReward(folder, processor=None, device="cpu")
    with pytest.raises(RewardError, match="ImageReward .* not trained, or not those of this model"):
        reward.self_check()
    _rig(reward)
    reward.self_check()


@torch.no_grad()
def _rig(reward: ImageReward) -> None:
    """Makes the head answer 1 to a drawing with its caption and 0 to every other pair."""
    states: list[Tensor] = []
    head = reward.model["head"]
    hook = head.register_forward_hook(lambda module, args, out: states.append(args[0]))
    pictures = torch.cat([drawings(), noise()[None]])
    called(reward, pictures.repeat(4, 1, 1, 1), [caption for caption in SCENES for _ in pictures])
    hook.remove()
    first, *others = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
    first.weight.zero_()
    first.weight[:1] = solved(torch.cat(states), torch.eye(4, 5).flatten()[:, None])
    first.bias.zero_()
    for layer in others:
        layer.weight.zero_()
        layer.weight[0, 0] = 1
        layer.bias.zero_()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (f"{EYES}.norm.weight", "do not fit: .*post_layernorm.weight"),
        (f"{EYES}.patch_embed.proj.weight", "is not an ImageReward checkpoint: 'patch_embed.proj.weight' is missing"),
        ("mlp.layers.2.bias", "holds no head of linear layers"),
    ],
)
def test_another_checkpoint_is_refused(folder: str, name: str, sentence: str):
    torch.save({key: value for key, value in weights().items() if key != name}, Path(folder) / "other.pt")
    with pytest.raises(RewardError, match=sentence):
        called(ImageReward(folder, processor=None, file="other.pt"))
