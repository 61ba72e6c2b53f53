"""Image-text similarity by SigLIP 2 (arXiv:2502.14786) or SigLIP with a fixed resolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from flowalign.rewards.embedding import TextImage
from flowalign.rewards.weights import load_model


@dataclass(eq=False)
class Siglip2(TextImage):
    """Cosine similarity of image and prompt in [-1, 1]; the model's sigmoid would saturate for most pairs."""

    pretrained: str = "google/siglip2-so400m-patch14-384"

    def load(self) -> nn.Module:
        return load_model("SiglipModel", self.pretrained, self.revision, self.weights_dtype)

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).pooler_output

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        # Trained on lower case, which not every published tokenizer applies, and without a padding mask.
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokens([prompt.lower() for prompt in prompts], limit)
        return self.model.text_model(input_ids=tokens["input_ids"]).pooler_output
