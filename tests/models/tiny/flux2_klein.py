"""FLUX.2 [klein] with random weights, not distilled; it uses the outputs of three layers of its text encoder."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import flux2_vae, qwen3, qwen_tokenizer, seeded

PIPELINE = "Flux2KleinPipeline"
GUIDANCE = (1.0, 4.0)
NEGATIVE = ""
MODEL = CALL = {"max_sequence_length": 64}  # letters are tokens here, and so is the template
TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": [4, 4, 4, 4],
    "guidance_embeds": False,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    return Flux2KleinPipeline(
        transformer=seeded(Flux2Transformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=qwen3(Qwen3ForCausalLM, layers=28),
        tokenizer=qwen_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
