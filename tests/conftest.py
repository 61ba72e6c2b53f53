"""Shared fixtures: reference vectors, composed configs of a tiny geometry, and a random SD3 with all its parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from omegaconf import DictConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
# Equality to the last bit is a statement about our code; two threads may split the same product differently. It is
# quicker too, for networks of this size.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Callable[[str], dict]:
    """Loader of one reference file: numeric arrays as tensors, the others as they are."""

    def load(name: str) -> dict:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(a) if a.dtype.kind in "fi" else a for key, a in arrays.items()}

    return load


@pytest.fixture
def agrees() -> Callable[[Tensor, Tensor, float], bool]:
    """max |ours - theirs| ≤ tolerance · max |theirs|, for equal shapes."""

    def compare(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        ours, theirs = ours.detach().double(), theirs.double()
        return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())

    return compare


# ------------------------------------------------------------ composed configs

ROOT = Path(__file__).parents[1]
TINY = (
    "batch.prompts=2",
    "batch.group_size=2",
    "batch.micro=3",
    "batch.updates=2",
    "tune=lora",
    "rollout.num_steps=4",
    "rollout.batch_size=4",
    "times.num=null",
    "evaluation.sampling.num_steps=3",
    "evaluation.num_val=4",
    "evaluation.num_test=4",
    "evaluation.shown=2",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.check_val_every_n_epoch=1",
)
"""Two groups of two pictures in four steps: everything happens, twice, and nothing takes long."""


def settled(*overrides: str) -> list[str]:
    """Overrides with the last word on every key, since Hydra refuses two choices of one group."""
    return list({word.partition("=")[0]: word for word in overrides}.values())


@pytest.fixture
def compose(tmp_path: Path) -> Callable[..., DictConfig]:
    """The config that a command line would compose, without Hydra's runtime node; outputs go to a temporary folder."""

    def composed(*overrides: str, name: str = "train", paths: bool = True) -> DictConfig:
        from hydra import compose, initialize_config_dir

        folder = [f"paths.output_dir={tmp_path}"] if paths else []
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose(name, settled(*folder, *overrides))

    return composed


@pytest.fixture
def tiny(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """The same with the tiny geometry, silent unless an override says otherwise."""

    def composed(*overrides: str) -> DictConfig:
        return compose("logger=none", "callbacks=none", *TINY, *overrides)

    return composed


# ------------------------------------------------------------ a random SD3

SD3_TRANSFORMER = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 32,
}


def shaken(module: torch.nn.Module, seed: int = 0) -> Any:
    """The module with noise on every parameter, so that parts initialised at zero or one matter as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


@pytest.fixture
def transformer() -> Any:
    """A random SD3 transformer of 50 thousand parameters, the same every time."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return shaken(SD3Transformer2DModel(**SD3_TRANSFORMER))


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline in diffusers layout with two CLIPs, a T5 and shift 3: from configs, nothing downloaded."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.3,
        shift_factor=0.1,
    )
    clips = [shaken(CLIPTextModelWithProjection(_clip_config()), seed) for seed in (1, 2)]
    pipe = StableDiffusion3Pipeline(
        transformer=shaken(SD3Transformer2DModel(**SD3_TRANSFORMER)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shaken(vae),
        text_encoder=clips[0],
        tokenizer=_clip_tokenizer(),
        text_encoder_2=clips[1],
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=shaken(T5EncoderModel(_t5_config())),
        tokenizer_3=_t5_tokenizer(),
    )
    folder = tmp_path_factory.mktemp("random_sd3")
    pipe.save_pretrained(folder)
    return folder


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]


def _clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    characters = _byte_alphabet()
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _clip_config() -> Any:
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


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    letters = [(chr(c), -3.0) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _t5_config() -> Any:
    from transformers import T5Config

    return T5Config(vocab_size=128, d_model=64, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
