"""Z-Image with random weights."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import qwen3, qwen_tokenizer, seeded, vae

PIPELINE = "ZImagePipeline"
GUIDANCE = (0.0, 4.0)
MODEL = CALL = {"max_sequence_length": 80}  # letters are tokens here, and these prompts end on both sides of 32
TRANSFORMER = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 4,
    "dim": 64,  # the embedding of time is large whatever this is
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "cap_feat_dim": 16,
    "axes_dims": [8, 4, 4],
    "axes_lens": [1024, 32, 32],
}


def build() -> Any:
    """The pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    return ZImagePipeline(
        transformer=seeded(ZImageTransformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=qwen3(Qwen3Model, layers=3),
        tokenizer=qwen_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
