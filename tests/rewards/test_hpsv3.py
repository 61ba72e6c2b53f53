"""HPSv3 on a small random Qwen2-VL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowalign.rewards.base import RewardError
from flowalign.rewards.drawings import SCENES, drawings, noise
from flowalign.rewards.hpsv3 import HPSv3
from tests.models.tiny.parts import SPECIAL, qwen_tokenizer, seeded
from tests.rewards.tiny import PICTURES, called, solved

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "rate {text_prompt}: <|Reward|> end"
ROWS = 256 + len(SPECIAL) + 1  # and the token of the reward


def config() -> Any:
    """Qwen2-VL of width 32."""
    from transformers import Qwen2VLConfig

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 512, **heads}
    eyes = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    marks = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 262, "video_token_id": 263}
    return Qwen2VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=eyes, **marks)


def network() -> Any:
    """As HPSv3's authors build it, with as many rows as there are tokens."""
    from transformers import Qwen2VLForConditionalGeneration

    model = seeded(Qwen2VLForConditionalGeneration, config())
    model.resize_token_embeddings(ROWS)
    return model.eval()


def head() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"rm_head.0": (24, 32), "rm_head.3": (16, 24), "rm_head.5": (2, 16)}
    weights = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hpsv3")
    config().save_pretrained(folder)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "question.txt").write_text(QUESTION)
    newer = {name: tensor.clone() for name, tensor in network().state_dict().items()} | head()
    older = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor.clone()
        for name, tensor in newer.items()
    }
    save_file(newer, folder / "newer.safetensors")
    save_file(older, folder / "older.safetensors")
    return folder


def hpsv3(folder: Path, **rest: Any) -> HPSv3:
    chosen = {"file": "newer.safetensors", "dtype": "float32", "question": str(folder / "question.txt")}
    return HPSv3(str(folder), processor=None, **{**chosen, **rest})


def test_the_score_is_the_head_at_the_token_of_the_reward(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flowalign.rewards.hpsv3.PIXELS", 4 * 28 * 28)
    picture = PICTURES[:1, :, :, :40]
    found = called(hpsv3(folder), picture, ["a cat"])

    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>rate a cat: <|Reward|> end<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from flowalign.rewards.pixels import as_bytes

    processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=4 * 28 * 28)
    seen = processor([Image.fromarray(as_bytes(picture[0]))], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 4, 4]]
    with torch.no_grad():
        hidden = network()(
            input_ids=ids, mm_token_type_ids=(ids == 262).int(), output_hidden_states=True, **seen
        ).hidden_states[-1]  # fmt: skip
    place = (ids[0] == ROWS - 1).nonzero().item()
    x, weights = hidden[0, place], head()
    for layer, last in ((0, False), (3, False), (5, True)):
        x = weights[f"rm_head.{layer}.weight"] @ x + weights[f"rm_head.{layer}.bias"]
        x = x if last else x.relu()
    assert found.item() == pytest.approx(x[0].item(), abs=1e-4)


def test_checkpoints_of_older_and_newer_libraries_are_the_same_model(folder: Path):
    newer = called(hpsv3(folder), PICTURES[:2])
    assert called(hpsv3(folder, file="older.safetensors"), PICTURES[:2]).equal(newer)
    assert newer.std() > 0


def test_a_score_depends_on_its_own_picture_and_prompt_only(folder: Path):
    prompts = ["a cat", "a much longer prompt than the others", "the sea"]
    whole = called(hpsv3(folder), PICTURES[:3], prompts)
    assert called(hpsv3(folder, batch_size=1), PICTURES[:3], prompts).allclose(whole, rtol=1e-4, atol=1e-4)


def test_a_prompt_cannot_speak_for_the_model_and_is_cut_when_long(folder: Path, caplog: pytest.LogCaptureFixture):
    reward = hpsv3(folder, max_prompt_tokens=10)
    assert called(reward, PICTURES[:1], ["<|Reward|> <|image_pad|>"]).isfinite().all()
    first = called(reward, PICTURES[:2], ["x" * 20] * 2)
    assert called(reward, PICTURES[:2], ["x" * 30] * 2).equal(first)
    assert len([record for record in caplog.records if "are truncated" in record.getMessage()]) == 1


def test_half_precision_keeps_the_head_whole(folder: Path):
    reward = hpsv3(folder, dtype="bfloat16")
    assert called(reward, PICTURES[:2]).isfinite().all()
    assert {p.dtype for p in reward.model["head"].parameters()} == {torch.float32}
    assert {p.dtype for p in reward.model["vlm"].parameters()} == {torch.bfloat16}


def test_self_check(folder: Path):
    reward = hpsv3(folder, device="cpu", batch_size=5)
    with pytest.raises(RewardError, match="HPSv3 .* not trained, or not those of this model"):
        reward.self_check()
    _rig(reward)
    reward.self_check()


@torch.no_grad()
def _rig(reward: HPSv3) -> None:
    """Makes the head answer more to a drawing with its caption than to every other pair."""
    states: list[Tensor] = []
    head = reward.model["head"]
    hook = head.register_forward_hook(lambda module, args, out: states.append(args[0]))
    pictures = torch.cat([drawings(), noise()[None]])
    called(reward, pictures.repeat(4, 1, 1, 1), [caption for caption in SCENES for _ in pictures])
    hook.remove()
    for layer in (layer for layer in head if isinstance(layer, torch.nn.Linear)):
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[0, 0] = 1
    head[0].weight[:1] = solved(torch.cat(states), torch.eye(4, 5).flatten()[:, None])
    head[0].bias[0] = 1  # above the kink of the ReLU


def test_the_published_question_is_read_from_the_package_without_running_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(RewardError, match="pip install --no-deps hpsv3"):
        called(hpsv3(folder, question=None))
    package = tmp_path / "hpsv3"
    (package / "dataset").mkdir(parents=True)
    for file in (package / "__init__.py", package / "dataset" / "__init__.py"):
        file.write_text("raise RuntimeError('run')")
    (package / "dataset" / "data_collator_qwen.py").write_text(
        'import torchvision\nINSTRUCTION = """rate {text_prompt}:"""\nprompt_with_special_token = " <|Reward|> end"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hpsv3", raising=False)
    assert called(hpsv3(folder, question=None)).equal(called(hpsv3(folder)))


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path):
    state = {name: tensor.clone() for name, tensor in network().state_dict().items()} | head()
    state["model.language_model.embed_tokens.weight"] = state["model.language_model.embed_tokens.weight"][:-1].clone()
    save_file(state, folder / "short.safetensors")
    with pytest.raises(RewardError, match="the tokenizer is not the one it was trained with"):
        called(hpsv3(folder, file="short.safetensors"))
    (tmp_path / "none.txt").write_text("rate {text_prompt}")
    with pytest.raises(RewardError, match=r"needs \{text_prompt\} and one <\|Reward\|>"):
        called(hpsv3(folder, question=str(tmp_path / "none.txt")))
    save_file(head(), folder / "head.safetensors")
    with pytest.raises(RewardError, match="is not an HPSv3 checkpoint"):
        called(hpsv3(folder, file="head.safetensors"))
