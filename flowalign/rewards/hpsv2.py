"""Human preference for images of a prompt, by HPSv2 and v2.1 (arXiv:2306.09341)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from flowalign.rewards.base import RewardError
from flowalign.rewards.embedding import TextImage
from flowalign.rewards.open_clip import to_transformers
from flowalign.rewards.pixels import ImageTransform
from flowalign.rewards.weights import build, fetch, load_config, load_tensors


@dataclass(eq=False)
class HPSv2(TextImage):
    """Cosine similarity of image and prompt, about 0.2 to 0.35, by a CLIP ViT-H/14 with weights in open_clip's layout.

    file: the checkpoint, HPS_v2.1_compressed.pt or HPS_v2_compressed.pt; processor: hub id or folder with config.json
    and tokenizer of that CLIP.
    """

    pretrained: str = "xswu/HPSv2"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    file: str = "HPS_v2.1_compressed.pt"

    def load(self) -> nn.Module:
        config = load_config("CLIPConfig", self.processor or self.pretrained, self._processor_revision)
        path = fetch(self.pretrained, self.file, self.revision)
        try:
            state = to_transformers(load_tensors(path))
        except KeyError as error:
            raise RewardError(
                f"{path} is not a CLIP checkpoint in open_clip's layout: {error} is unexpected."
            ) from error

        def clip() -> nn.Module:
            from transformers import CLIPModel

            return CLIPModel(config)

        return build(clip, state, self.weights_dtype, str(path))

    @cached_property
    def transform(self) -> ImageTransform:
        # As in the authors' code, the whole image is kept and padded with black to a square.
        side = self.model.config.vision_config.image_size
        return ImageTransform((side, side), "longest")
