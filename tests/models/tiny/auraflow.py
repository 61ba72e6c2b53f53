"""AuraFlow with random weights, with prompts that end before the padding does."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import seeded, t5, t5_tokenizer, vae

PIPELINE = "AuraFlowPipeline"
GUIDANCE = (1.0, 3.5)
MODEL = CALL = {"max_sequence_length": 40}  # letters are tokens here
TRANSFORMER = {
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pos_embed_max_size": 256,
}


def build() -> Any:
    """The pipeline."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    return AuraFlowPipeline(
        transformer=seeded(AuraFlowTransformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(shift_factor=None),
        text_encoder=t5(umt5=True),
        tokenizer=t5_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"guidance_scale": guidance}
