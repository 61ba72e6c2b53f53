"""FLUX.2 [dev] with random weights: a Mistral text encoder, and guidance as an input."""

from __future__ import annotations

from typing import Any

from tests.models.tiny import flux2_klein
from tests.models.tiny.parts import flux2_vae, mistral3, qwen_tokenizer, seeded

PIPELINE = "Flux2Pipeline"
GUIDANCE = (1.0,)  # its call supports only the embedded one
NEGATIVE = ""
MODEL = CALL = {"max_sequence_length": 64}
TRANSFORMER = flux2_klein.TRANSFORMER | {"guidance_embeds": True}
USER_ONLY = "{% for m in messages[1:] %}<|im_start|>{{ m['content'][0]['text'] }}<|im_end|>{% endfor %}"


def build() -> Any:
    """The pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = USER_ONLY  # the system's message has more letters than there is room
    return Flux2Pipeline(
        transformer=seeded(Flux2Transformer2DModel, **TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=mistral3(layers=31),
        tokenizer=tokenizer,
    )


def arguments(guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for this guidance."""
    del guidance
    return {"guidance_scale": 4.0}
