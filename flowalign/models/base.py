"""The adapter protocol: the thin truth about one diffusers pipeline.

Outside an adapter there is one convention (flow.py): spatial float32 latents, sigma in [0, 1], v = eps - x0. Sign,
time scale, packing, guidance and VAE normalisation are settled here and nowhere else.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowalign.models.loading import load_pipeline
from flowalign.types import Conditioning

NEGATIVE = "neg."  # key prefix of the unconditional branch in a Conditioning


def torch_dtype(name: str) -> torch.dtype:
    """The torch type called `name`."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in known:
        raise ValueError(f"a dtype is one of {', '.join(known)} (got {name!r}).")
    return known[name]


class FlowModel(ABC):
    """A flow-matching pipeline, as rollouts, losses and evaluation see it.

    `pretrained` is a hub id, a local folder in diffusers layout, or the name of a pipeline inside this package.
    Components that are not trained are held in `dtype`; the denoisers in `train_dtype`.
    """

    pipeline: ClassVar[str]
    modality: ClassVar[str] = "image"
    denoiser_names: ClassVar[tuple[str, ...]] = ("transformer",)
    default_lora_targets: ClassVar[tuple[str, ...]]
    default_max_sequence_length: ClassVar[int]
    guidance_off: ClassVar[float] = 1.0  # classifier-free guidance at or below this is off

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        train_dtype: str = "float32",
        lora_targets: Sequence[str] | None = None,
        max_sequence_length: int | None = None,
        absent: Sequence[str] = (),
    ) -> None:
        """max_sequence_length counts text tokens (null = the family's default); `absent` components are not loaded."""
        self.pretrained, self.revision = pretrained, revision
        self.max_sequence_length = max_sequence_length or self.default_max_sequence_length
        self.lora_targets = tuple(lora_targets or self.default_lora_targets)
        self.pipe = load_pipeline(
            self.pipeline, pretrained, revision, variant, torch_dtype(dtype), dict.fromkeys(absent)
        )
        for denoiser in self.denoisers().values():
            if denoiser.dtype != torch_dtype(train_dtype):  # diffusers warns of every cast, also of an empty one
                denoiser.to(torch_dtype(train_dtype))
            denoiser.eval().requires_grad_(False)
        for component in self.frozen_components():
            component.eval().requires_grad_(False)

    def denoisers(self) -> dict[str, nn.Module]:
        """What is trained, sharded and checkpointed, by its name in the pipeline."""
        return {name: getattr(self.pipe, name) for name in self.denoiser_names}

    def frozen_components(self) -> list[nn.Module]:
        """Everything else with weights: text encoders and VAE."""
        parts = [part for name, part in self.pipe.components.items() if name not in self.denoiser_names]
        return [part for part in parts if isinstance(part, nn.Module)]

    def to(self, device: torch.device) -> FlowModel:
        """Moves the frozen components; the denoisers belong to the policy."""
        for component in self.frozen_components():
            component.to(device)
        self.device = device
        return self

    device: torch.device = torch.device("cpu")

    # ------------------------------------------------------------ size and schedule

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.pipe.vae_scale_factor * 2

    def check_size(self, height: int, width: int) -> None:
        m = self.size_multiple
        if height % m or width % m or min(height, width) < m:
            nearest = [max(m, round(side / m) * m) for side in (height, width)]
            raise ValueError(
                f"{type(self).__name__} cannot make pictures of {height}×{width}: both must be multiples of {m}; "
                f"the nearest is {nearest[0]}×{nearest[1]}."
            )

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Shape of one latent, such that randn(B, *shape) is the noise the pipeline itself would draw."""
        del frames
        scale = self.pipe.vae_scale_factor
        return (self.pipe.transformer.config.in_channels, height // scale, width // scale)

    def sigmas(self, num_steps: int, height: int, width: int, frames: int | None = None) -> Tensor:
        """(num_steps + 1,) float32 from 1 to 0 on the CPU: exactly what the pipeline's own call would walk."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(num_steps, **self.schedule_arguments(num_steps, height, width, frames))
        return scheduler.sigmas.float().cpu()

    def schedule_arguments(self, num_steps: int, height: int, width: int, frames: int | None) -> dict[str, Any]:
        """Arguments of `set_timesteps`: a family with a resolution-dependent shift gives `mu` here."""
        del num_steps, height, width, frames
        return {}

    def shift(self, height: int, width: int, frames: int | None = None) -> float:
        """How far the schedule is moved towards the noise: sigma = s u / (1 + (s - 1) u) of an even time u, s ≥ 1."""
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift") or 1.0)
        mu = float(self.schedule_arguments(1, height, width, frames)["mu"])
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    # ------------------------------------------------------------ network

    @abstractmethod
    def encode(self, prompts: Sequence[str], negatives: Sequence[str] | None = None) -> Conditioning:
        """Text to Conditioning, one row a prompt; `negatives` adds the unconditional branch under "neg."."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        """v of one branch. x (B, …) spatial, t (B,) = 1000 sigma in float32, branch without the unconditional part."""

    def velocity(self, x: Tensor, sigma: Tensor | float, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        """v = eps - x0 in float32, (B, …). sigma is a number or (B,); guidance is classifier-free and off at 1."""
        t = 1000 * torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        positive = Conditioning({k: c for k, c in cond.items() if not k.startswith(NEGATIVE)})
        if guidance <= self.guidance_off:
            return self.forward(x, t, positive).float()
        negative = Conditioning({k.removeprefix(NEGATIVE): c for k, c in cond.items() if k.startswith(NEGATIVE)})
        both = Conditioning.cat([negative, positive])  # one forward of 2B rows, in the pipeline's order
        v_negative, v_positive = self.forward(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return self.guide(v_negative, v_positive, guidance)

    def guide(self, v_negative: Tensor, v_positive: Tensor, guidance: float) -> Tensor:
        return v_negative + guidance * (v_positive - v_negative)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents to pictures (B, 3, H, W) float32 in [0, 1]."""
        vae = self.pipe.vae
        z = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(z.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, media: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] to latents in float32, normalised as the denoiser knows them."""
        vae = self.pipe.vae
        z = vae.encode((2 * media - 1).to(vae.dtype), return_dict=False)[0].mode().float()
        return (z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    # ------------------------------------------------------------ files

    def blocks(self) -> list[nn.Module]:
        """The repeated units of the denoisers, for sharding, compilation and checkpointing."""
        lists = [m for d in self.denoisers().values() for m in d.children() if isinstance(m, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def save_lora(self, folder: Path) -> None:
        """Writes the adapters of all denoisers; `load_lora_weights(folder)` restores them with the right alpha."""
        from peft.utils import get_peft_model_state_dict

        arguments: dict[str, Any] = {}
        for name, denoiser in self.denoisers().items():
            arguments[f"{name}_lora_layers"] = get_peft_model_state_dict(denoiser)
            # Without this header alpha would come back as the rank.
            arguments[f"{name}_lora_adapter_metadata"] = denoiser.peft_config["default"].to_dict()  # type: ignore
        type(self.pipe).save_lora_weights(str(folder), **arguments)
