"""Qwen-Image with random weights, a video VAE and a schedule that stops short of zero before its last step."""

from __future__ import annotations

from typing import Any

from tests.models.tiny.parts import qwen_tokenizer, qwen_vae, qwen_vl, seeded

PIPELINE = "QwenImagePipeline"
GUIDANCE = (1.0, 4.0)
MODEL = CALL = {"max_sequence_length": 512}  # letters are tokens here, and the template alone has some 200
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def build() -> Any:
    """The pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(
        transformer=seeded(QwenImageTransformer2DModel, **TRANSFORMER),
        scheduler=scheduler,
        vae=qwen_vae(),
        text_encoder=qwen_vl(),
        tokenizer=qwen_tokenizer(),
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    return {"true_cfg_scale": guidance}
