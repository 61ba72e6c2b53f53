"""Random tokenizers, text encoders and VAEs for tiny pipelines, built from configs without downloads."""

from __future__ import annotations

from typing import Any

import torch


def shaken(module: torch.nn.Module, seed: int = 0) -> Any:
    """Add noise to every parameter, so that those initialised to zero or one matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def seeded(make: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A module with reproducible random weights, with noise on every parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make(*args, **kwargs)
    return shaken(module, seed)


# ------------------------------------------------------------ text


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 printable characters that represent bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]


def clip_tokenizer() -> Any:
    """Letters as tokens."""
    from transformers import CLIPTokenizer

    characters = _byte_alphabet()
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def clip_config() -> Any:
    """Two layers of width 32."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
    )


def t5_tokenizer() -> Any:
    """Letters as tokens."""
    from transformers import T5Tokenizer

    letters = [(chr(c), -3.0) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5(width: int = 32, umt5: bool = False) -> Any:
    """A two-layer encoder."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
    }
    return seeded(UMT5EncoderModel, UMT5Config(**sizes)) if umt5 else seeded(T5EncoderModel, T5Config(**sizes))


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> Any:
    """Bytes as tokens; stands in for Gemma's and Llama's too."""
    from transformers import Qwen2Tokenizer

    vocab = {c: i for i, c in enumerate(_byte_alphabet() + SPECIAL)}
    return Qwen2Tokenizer(vocab=vocab, merges=[], chat_template=CHAT, additional_special_tokens=SPECIAL[1:])


def qwen_vl() -> Any:
    """Qwen 2.5 VL with two layers and an equally small vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    attention: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": 264,
        **attention,
    }
    eyes: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    marks: dict[str, Any] = {
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "image_token_id": 262,
        "video_token_id": 263,
    }
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=eyes, **marks)
    return seeded(Qwen2_5_VLForConditionalGeneration, config)


def qwen3(kind: Any, layers: int) -> Any:
    """Qwen 3 of width 16, with or without its head."""
    from transformers import Qwen3Config

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=264, num_key_value_heads=2, num_hidden_layers=layers, **sizes)
    return seeded(kind, config)


def mistral3(layers: int) -> Any:
    """Mistral 3 of width 16 with an equally small vision tower."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    text = {"model_type": "mistral", "vocab_size": 264, "num_key_value_heads": 2, "num_hidden_layers": layers, **sizes}
    eyes = {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, **sizes}
    config = Mistral3Config(text_config=text, vision_config=eyes, image_token_index=262)
    return seeded(Mistral3ForConditionalGeneration, config)


def gemma2() -> Any:
    """Gemma 2 of width 16 with two layers, without its head."""
    from transformers import Gemma2Config, Gemma2Model

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    return seeded(Gemma2Model, Gemma2Config(vocab_size=264, num_key_value_heads=2, num_hidden_layers=2, **sizes))


# ------------------------------------------------------------ pictures

KL: dict[str, Any] = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def pictures(n: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Random 8-bit images (n, 3, height, width) in [0, 1]."""
    levels = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels / 255


def vae(**changes: Any) -> Any:
    """An AutoencoderKL of factor 2 and 4 channels with a scale and a shift."""
    from diffusers import AutoencoderKL

    return seeded(AutoencoderKL, **{**KL, "scaling_factor": 1.3, "shift_factor": 0.1, **changes})


def flux2_vae() -> Any:
    """An AutoencoderKLFlux2 of the same size with a mean and standard deviation of each of the 16 values of a patch."""
    from diffusers import AutoencoderKLFlux2

    module = seeded(AutoencoderKLFlux2, **KL)
    module.bn.running_mean.copy_(torch.linspace(-0.3, 0.3, 16))
    module.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return module


def wan_vae() -> Any:
    """A causal video VAE of factor 8 in space and 4 in time, with a mean and standard deviation of its 16 channels."""
    from diffusers import AutoencoderKLWan

    return seeded(
        AutoencoderKLWan,
        base_dim=3,
        z_dim=16,
        dim_mult=[1] * 4,
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.05 * i - 0.3 for i in range(16)],
        latents_std=[0.8 + 0.05 * i for i in range(16)],
    )


def qwen_vae() -> Any:
    """An AutoencoderKLQwenImage of factor 4 and 4 channels with a mean and standard deviation of each."""
    from diffusers import AutoencoderKLQwenImage

    sizes: dict[str, Any] = {"base_dim": 12, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1}
    statistics: dict[str, Any] = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.2, 0.8, 1.5, 1.0]}
    return seeded(AutoencoderKLQwenImage, temperal_downsample=[False, True], **sizes, **statistics)
