"""Chroma with random weights, with prompts that end before the padding does."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import seeded, t5, t5_tokenizer, vae

PIPELINE = "ChromaPipeline"
GUIDANCE = (1.0, 5.0)
MODEL = CALL = {"max_sequence_length": 40}  # letters are tokens here
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 4, 8],
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return ChromaPipeline(
        transformer=seeded(ChromaTransformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=1024),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
