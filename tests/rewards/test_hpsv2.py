"""HPSv2: weights in open_clip's layout, whole pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, multi_head_attention_forward, normalize

from flowalign.rewards.base import RewardError
from flowalign.rewards.hpsv2 import HPSv2
from tests.models.tiny.parts import clip_tokenizer
from tests.rewards.tiny import PICTURES, PROMPTS, called, clip_parts, rig_text

WIDTH, HEADS, LAYERS, D, PATCH, SIDE, WORDS, LENGTH = 32, 4, 2, 24, 8, 32, 514, 77


def weights() -> dict[str, Tensor]:
    """A random CLIP with open_clip's names and shapes."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    state = {
        "visual.class_embedding": some(WIDTH),
        "visual.positional_embedding": some((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual.conv1.weight": some(WIDTH, 3, PATCH, PATCH),
        "visual.proj": some(WIDTH, D),
        "token_embedding.weight": some(WORDS, WIDTH),
        "positional_embedding": some(LENGTH, WIDTH),
        "text_projection": some(WIDTH, D),
        "logit_scale": torch.tensor(2.0),
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        state |= {f"{norm}.weight": 1 + some(WIDTH), f"{norm}.bias": some(WIDTH)}
    for tower, mlp in (("visual.transformer", 64), ("transformer", 37)):
        for layer in range(LAYERS):
            block = f"{tower}.resblocks.{layer}"
            for part, out, into in (
                ("attn.out_proj", WIDTH, WIDTH),
                ("mlp.c_fc", mlp, WIDTH),
                ("mlp.c_proj", WIDTH, mlp),
            ):
                state |= {f"{block}.{part}.weight": some(out, into), f"{block}.{part}.bias": some(out)}
            state |= {f"{block}.attn.in_proj_weight": some(3 * WIDTH, WIDTH)}
            state |= {f"{block}.attn.in_proj_bias": some(3 * WIDTH)}
            for norm in ("ln_1", "ln_2"):
                state |= {f"{block}.{norm}.weight": 1 + some(WIDTH), f"{block}.{norm}.bias": some(WIDTH)}
    return state


class OpenClip:
    """The network as its paper has it, from those names: nothing of transformers, nothing of our conversion."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def norm(self, x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (WIDTH,), self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def block(self, x: Tensor, name: str, mask: Tensor | None) -> Tensor:
        s = self.state
        y = self.norm(x, f"{name}.ln_1").transpose(0, 1)
        y, _ = multi_head_attention_forward(
            y, y, y, WIDTH, HEADS, s[f"{name}.attn.in_proj_weight"], s[f"{name}.attn.in_proj_bias"], None, None, False,
            0.0, s[f"{name}.attn.out_proj.weight"], s[f"{name}.attn.out_proj.bias"], False, attn_mask=mask,
        )  # fmt: skip
        x = x + y.transpose(0, 1)
        y = gelu(self.norm(x, f"{name}.ln_2") @ s[f"{name}.mlp.c_fc.weight"].T + s[f"{name}.mlp.c_fc.bias"])
        return x + y @ s[f"{name}.mlp.c_proj.weight"].T + s[f"{name}.mlp.c_proj.bias"]

    def pictures(self, pixels: Tensor) -> Tensor:
        s = self.state
        x = torch.nn.functional.conv2d(pixels, s["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + s["visual.positional_embedding"]
        x = self.norm(x, "visual.ln_pre")
        for layer in range(LAYERS):
            x = self.block(x, f"visual.transformer.resblocks.{layer}", None)
        return self.norm(x[:, 0], "visual.ln_post") @ s["visual.proj"]

    def texts(self, ids: Tensor) -> Tensor:
        """ids (b, LENGTH), zeros after the end, which is the highest number."""
        s = self.state
        x = s["token_embedding.weight"][ids] + s["positional_embedding"]
        mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        for layer in range(LAYERS):
            x = self.block(x, f"transformer.resblocks.{layer}", mask)
        return self.norm(x, "ln_final")[torch.arange(len(x)), ids.argmax(dim=1)] @ s["text_projection"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv2")
    config = clip_parts(hidden_act="gelu")
    config.text_config.hidden_act = "gelu"
    config.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    torch.save({"epoch": 1, "state_dict": weights()}, folder / "HPS_v2.1_compressed.pt")
    return folder


def hpsv2(folder: Path, **rest: Any) -> HPSv2:
    return HPSv2(str(folder), processor=None, **rest)


def test_the_converted_network_is_the_one_of_its_authors(folder: Path):
    reward = hpsv2(folder)
    ids = torch.zeros(len(PROMPTS), LENGTH, dtype=torch.long)  # their tokenizer pads with zeros
    for row, prompt in zip(ids, PROMPTS, strict=True):
        tokens = clip_tokenizer()(prompt)["input_ids"]
        row[: len(tokens)] = torch.tensor(tokens)
    theirs = OpenClip(weights())
    seen, read = theirs.pictures(reward.transform(PICTURES)), theirs.texts(ids)
    assert called(reward).allclose((normalize(seen) * normalize(read)).sum(dim=1), atol=1e-5)


def test_the_whole_of_a_wide_picture_is_seen(folder: Path):
    wide = torch.zeros(2, 3, 32, 64)
    wide[1, :, :, :8] = 1  # the middle square does not contain this
    first, second = called(hpsv2(folder), wide, ["a cat"] * 2)
    assert first != second


def test_batches_do_not_matter(folder: Path):
    assert called(hpsv2(folder, batch_size=2)).allclose(called(hpsv2(folder)), rtol=1e-5, atol=1e-6)


def test_self_check(folder: Path):
    reward = hpsv2(folder, device="cpu")
    with pytest.raises(RewardError, match="HPSv2 .* not trained, or not those of this model"):
        reward.self_check()
    rig_text(reward)
    reward.self_check()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"visual.proj": None}, "do not fit: .*visual_projection.weight"),
        ({"visual.proj": torch.zeros(WIDTH, 7)}, "do not fit: .*size mismatch for visual_projection.weight"),
        (
            {"visual.attn_pool.query": torch.zeros(1)},
            "is not a CLIP checkpoint in open_clip's layout: 'visual.attn_pool' is unexpected",
        ),
    ],
)
def test_another_checkpoint_is_refused(folder: Path, change: dict[str, Tensor | None], sentence: str):
    state = {name: tensor for name, tensor in (weights() | change).items() if tensor is not None}
    torch.save({"state_dict": state}, folder / "other.pt")
    with pytest.raises(RewardError, match=sentence):
        called(hpsv2(folder, file="other.pt"))


def test_a_checkpoint_that_runs_code_is_not_run(folder: Path):
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (folder / "run",)

    torch.save({"state_dict": Trap()}, folder / "trap.pt")
    with pytest.raises(RewardError, match="cannot be read as weights"):
        called(hpsv2(folder, file="trap.pt"))
    assert not (folder / "run").exists()
