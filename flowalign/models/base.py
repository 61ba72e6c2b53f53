"""Base class of the model adapters, each a thin wrapper around one diffusers pipeline.

Outside the adapters there is one convention (flow.py): spatial float32 latents, sigma in [0, 1], v = eps - x0. Only
adapters deal with sign, time scale, packing, guidance and VAE normalisation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowalign.dtypes import torch_dtype
from flowalign.models import schedule
from flowalign.models.loading import IMAGE_FOLDERS, TEXT_FOLDERS, fingerprint, keep_dtype, load_pipeline
from flowalign.models.quantised import Kind, quantise, weight_quantiser
from flowalign.types import Conditioning

NEGATIVE = "neg."
"""Key prefix of the unconditional branch in a Conditioning."""
SHARED = "cond."
"""Key prefix of the entries that both branches share, such as the latents of a reference image."""


def _encode_after_release(prompts: Sequence[str], *others: Any, **also: Any) -> Conditioning:
    raise RuntimeError(
        f"{prompts[0]!r} cannot be encoded: the text encoders were released (encoding.release=true), and this prompt "
        "was not encoded before, or its cached file is damaged."
    )


def _timesteps(sigma: Tensor | float, x: Tensor) -> Tensor:
    """(B,) = 1000 sigma in float32, on the device of x (B, …)."""
    return 1000 * torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))


def _conditional(cond: Conditioning) -> Conditioning:
    """The conditional branch, including the shared entries."""
    return Conditioning({key: entry for key, entry in cond.items() if not key.startswith(NEGATIVE)})


class FlowModel(ABC):
    """A flow-matching pipeline behind the interface that rollouts, losses and evaluation use.

    `pretrained` is a hub id, a local folder in diffusers layout, or the name of a pipeline embedded in this package.
    The denoisers are kept in `train_dtype`, the VAE in `vae_dtype` if given, all other components in `dtype`.
    """

    pipeline: ClassVar[str]
    modality: ClassVar[str] = "image"
    denoiser_names: ClassVar[tuple[str, ...]] = ("transformer",)
    default_lora_targets: ClassVar[tuple[str, ...]]
    default_max_sequence_length: ClassVar[int]
    guidance_off: ClassVar[float] = 1.0
    """Classifier-free guidance is off at or below this scale."""
    evenly: ClassVar[bool] = True
    """Whether the pipeline passes evenly spaced sigmas to its scheduler; otherwise the scheduler spaces them."""
    default_embedded_guidance: ClassVar[float | None] = None
    """Guidance scale that a guidance-distilled network takes as an input; None if it takes none."""
    sees_images: ClassVar[bool] = False
    """Whether prompts come with images: to be edited, or as the first frame of a video."""
    max_images: ClassVar[int] = 1
    """The most images that a prompt may come with."""
    checkpointing_is_exact: ClassVar[bool] = True
    """Whether gradient checkpointing leaves the prediction unchanged."""
    takes_attention_backend: ClassVar[bool] = True
    """Whether an attention backend of diffusers, once set, is used by the denoiser's layers."""
    vae_in_3d: ClassVar[bool] = False
    """Whether the VAE has 3-d convolutions."""
    one_text_length: ClassVar[bool] = True
    """Whether all prompts have the same number of tokens; otherwise a batch is padded to its longest prompt."""

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        train_dtype: str = "float32",
        vae_dtype: str | None = None,
        lora_targets: Sequence[str] | None = None,
        max_sequence_length: int | None = None,
        absent: Sequence[str] = (),
        embedded_guidance: float | None = None,
        quantised: Kind | None = None,
    ) -> None:
        """max_sequence_length counts text tokens (None: the family's default); `absent` components are not loaded.

        embedded_guidance is the input of a guidance-distilled network, the same in rollouts, training and evaluation.
        A given vae_dtype is also what the VAE computes in, under mixed precision too.
        quantised is the format in which the blocks of the denoisers are stored, frozen; they compute in `train_dtype`.
        """
        if embedded_guidance is not None and self.default_embedded_guidance is None:
            raise ValueError(
                f"{type(self).__name__} takes no embedded_guidance: use rollout.guidance, "
                f"which is off at {self.guidance_off:g}."
            )
        scale = self.default_embedded_guidance if embedded_guidance is None else embedded_guidance
        self.embedded_guidance = scale or 0.0  # 0 if the network takes none
        self.pretrained, self.revision, self.absent = pretrained, revision, tuple(absent)
        self.quantised = quantised
        quantiser = None if quantised is None else weight_quantiser(quantised)  # before loading: it may raise
        self.max_sequence_length = max_sequence_length or self.default_max_sequence_length
        self.lora_targets = tuple(lora_targets or self.default_lora_targets)
        dtypes = {"default": torch_dtype(dtype), **dict.fromkeys(self.denoiser_names, torch_dtype(train_dtype))}
        if vae_dtype is not None:
            dtypes["vae"] = torch_dtype(vae_dtype)
        self.pipe = load_pipeline(
            self.pipeline, pretrained, revision, variant, dtypes, dict.fromkeys(absent), self.denoiser_names
        )
        if vae_dtype is not None:
            keep_dtype(self.pipe.vae)
        for denoiser in self.denoisers().values():
            if denoiser.dtype != torch_dtype(train_dtype):  # one without weights
                denoiser.to(torch_dtype(train_dtype))
            denoiser.eval().requires_grad_(False)
        if quantised is not None and quantiser is not None:
            quantise(self.blocks(), quantised, quantiser)
        for component in self.frozen_components():
            component.eval().requires_grad_(False)

    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that are trained, sharded and checkpointed, by component name."""
        return {name: getattr(self.pipe, name) for name in self.denoiser_names}

    def frozen_components(self) -> list[nn.Module]:
        """All other components with weights: text encoders and VAE."""
        parts = [part for name, part in self.pipe.components.items() if name not in self.denoiser_names]
        return [part for part in parts if isinstance(part, nn.Module)]

    def to(self, device: torch.device) -> FlowModel:
        """Move the frozen components; the policy moves the denoisers."""
        for component in self.frozen_components():
            component.to(device)
        self.device = device
        return self

    device: torch.device = torch.device("cpu")

    def agree(self, wanted: Tensor) -> Tensor:
        """(n,) bool: the networks that any rank needs. Replaced by strategies whose ranks must call them together."""
        return wanted

    # ------------------------------------------------------------ size and schedule

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.pipe.vae_scale_factor * 2

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        """Raise ValueError, naming the nearest possible size, if the family cannot generate this one."""
        if frames is not None:
            raise ValueError(f"{type(self).__name__} makes pictures: leave resolution.*.frames at null (got {frames}).")
        self._check_sides(height, width)

    def _check_sides(self, height: int, width: int) -> None:
        m = self.size_multiple
        if height % m or width % m or min(height, width) < m:
            nearest = [max(m, round(side / m) * m) for side in (height, width)]
            raise ValueError(
                f"{type(self).__name__} cannot make pictures of {height}×{width}: both must be multiples of {m}; "
                f"the nearest is {nearest[0]}×{nearest[1]}."
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the spatial (unpacked) latent."""
        return self.pipe.transformer.config.in_channels

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Shape of one latent: randn(B, *shape) is the initial noise that the pipeline itself would draw."""
        del frames
        scale = self.pipe.vae_scale_factor
        return (self.latent_channels, height // scale, width // scale)

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        """Number of image tokens (patches of 2×2 latents), on which a resolution-dependent shift depends."""
        _, *sides = self.latent_shape(height, width, frames)
        return math.prod(sides) // 4

    def mu(self, num_steps: int, height: int, width: int, frames: int | None) -> float | None:
        """The scheduler's `mu`, for a shift that depends on the resolution; None if the shift is static."""
        del num_steps
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        return schedule.linear_mu(config, self.tokens(height, width, frames))

    def sigmas(self, num_steps: int, height: int, width: int, frames: int | None = None) -> Tensor:
        """(num_steps + 1,) float32 from 1 to 0 on the CPU: exactly the schedule of the pipeline's own call."""
        scheduler = schedule.euler(self.pipe.scheduler)
        evenly = self.evenly or scheduler is not self.pipe.scheduler  # multistep ones space evenly, then shift
        return schedule.sigmas(scheduler, num_steps, evenly, self.mu(num_steps, height, width, frames))

    def shift(self, height: int, width: int, frames: int | None = None) -> float:
        """The shift s ≥ 1 of the schedule towards noise: sigma = s u / (1 + (s - 1) u) for uniform time u."""
        return schedule.shift(schedule.euler(self.pipe.scheduler).config, self.mu(1, height, width, frames))

    # ------------------------------------------------------------ network

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] | None = None,
        images: Sequence[Tensor] | None = None,
        size: tuple[int, int, int | None] | None = None,
    ) -> Conditioning:
        """Encode prompts, one row each; `negatives` adds the unconditional branch under "neg.".

        Families with `sees_images` also take `images`, (n, 3, H, W) in [0, 1] per prompt, and `size`, the (height,
        width, frames) to generate; their encodings are stored under "cond.". The others take neither. Override this
        where the two branches are encoded differently, or where the text encoder sees the images.
        """
        cond = self.text(prompts)
        if negatives is not None:
            cond |= {f"{NEGATIVE}{key}": entry for key, entry in self.text(negatives).items()}
        if self.sees_images:
            cond |= self.seen(prompts, images, size)
        return cond

    def text(self, texts: Sequence[str]) -> Conditioning:
        """Encode one branch, one row per text."""
        raise NotImplementedError(f"{type(self).__name__} needs text(), or an encode() of its own.")

    def seen(
        self, prompts: Sequence[str], images: Sequence[Tensor] | None, size: tuple[int, int, int | None] | None
    ) -> Conditioning:
        """Encode the images, under "cond."; only for families with `sees_images`."""
        raise NotImplementedError(f"{type(self).__name__} needs seen().")

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        """v of one branch: x (B, …) spatial, t (B,) = 1000 sigma in float32, `branch` without key prefix "neg."."""

    def unguided(self, x: Tensor, sigma: Tensor | float, cond: Conditioning) -> Tensor:
        """v of the conditional branch in one forward pass, even if noise levels differ; otherwise as `velocity`."""
        return self.forward(x, _timesteps(sigma, x), _conditional(cond)).float()

    def velocity(
        self, x: Tensor, sigma: Tensor | float, cond: Conditioning, guidance: float = 1.0, through_both: bool = True
    ) -> Tensor:
        """v = eps - x0, (B, …) in float32. sigma is a number or (B,), guidance the classifier-free scale.

        through_both=False treats the unconditional branch as a constant: no gradient, no stored activations.
        """
        if guidance <= self.guidance_off:
            return self.unguided(x, sigma, cond)
        t, positive = _timesteps(sigma, x), _conditional(cond)
        shared = {k: c for k, c in cond.items() if k.startswith(SHARED)}
        negative = {k.removeprefix(NEGATIVE): c for k, c in cond.items() if k.startswith(NEGATIVE)}
        if not through_both and torch.is_grad_enabled():
            with torch.no_grad():
                v_negative = self.forward(x, t, Conditioning(negative | shared)).float()
            return self.guide(v_negative, self.forward(x, t, positive).float(), guidance)
        both = Conditioning.cat([Conditioning(negative | shared), positive])  # one forward of 2B rows, in SD3's order
        v_negative, v_positive = self.forward(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return self.guide(v_negative, v_positive, guidance)

    def guide(self, v_negative: Tensor, v_positive: Tensor, guidance: float) -> Tensor:
        """Combine the velocities of both branches, (B, …), into the guided one."""
        return v_negative + guidance * (v_positive - v_negative)

    def denormalised(self, x: Tensor) -> Tensor:
        """Map latents from the scale of the denoiser to that of the VAE."""
        config = self.pipe.vae.config
        return x / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def normalised(self, z: Tensor) -> Tensor:
        """Map latents from the scale of the VAE to that of the denoiser: the inverse of `denormalised`."""
        config = self.pipe.vae.config
        return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Decode latents to images (B, 3, H, W) or videos (B, F, 3, H, W), float32 in [0, 1]."""
        vae = self.pipe.vae
        media = vae.decode(self.denormalised(x).to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
        return media.clamp(0, 1).contiguous()  # running.vae_channels_last changes the layout

    @torch.no_grad()
    def encode_images(self, media: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to float32 latents on the scale of the denoiser."""
        vae = self.pipe.vae
        return self.normalised(vae.encode((2 * media - 1).to(vae.dtype), return_dict=False)[0].mode().float())

    # ------------------------------------------------------------ text encoders

    def text_fingerprint(self) -> str:
        """Identify everything but the text that a prompt's encoding depends on; part of the key of the disk cache."""
        encoder = next((m for name, m in self.text_encoders().items()), None)
        kind = f"{type(self).__name__} {self.max_sequence_length} {getattr(encoder, 'dtype', None)} {self.absent}"
        kind += f" {self.pipe.vae.dtype}" if self.sees_images else ""
        folders = (*TEXT_FOLDERS, *IMAGE_FOLDERS) if self.sees_images else TEXT_FOLDERS
        return f"{kind} {fingerprint(self.pretrained, self.revision, folders)}"

    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders, by component name."""
        parts = {name: part for name, part in self.pipe.components.items() if name.startswith("text_encoder")}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def release_text_encoders(self) -> None:
        """Free the memory of the text encoders; `encode` raises RuntimeError afterwards."""
        self.pipe.register_modules(**dict.fromkeys(self.text_encoders()))
        self.encode = _encode_after_release  # type: ignore[method-assign]

    # ------------------------------------------------------------ files

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of the denoisers: the units of sharding, compilation and checkpointing."""
        lists = [m for d in self.denoisers().values() for m in d.children() if isinstance(m, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def enable_context_parallel(self, context: int, mesh: Any) -> None:
        """Split sequences over neighbouring ranks by diffusers' plans. mesh has dimensions (…, "ring", "ulysses")."""
        from diffusers import ContextParallelConfig

        for denoiser in self.denoisers().values():
            denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=context, mesh=mesh))  # type: ignore

    @property
    def loads_lora(self) -> bool:
        """Whether the pipeline can load LoRA adapters; otherwise its denoisers load them."""
        return hasattr(type(self.pipe), "save_lora_weights")

    def save_lora(self, folder: Path) -> None:
        """Save the adapters, such that the pipeline's `load_lora_weights(folder)` restores them with the right alpha.

        Those of a second denoiser go to folder/NAME, for `load_lora_weights(folder/NAME, load_into_NAME=True)`. If the
        pipeline has no LoRA loader, the denoiser's `load_lora_adapter(folder, prefix=None, use_safetensors=True)`
        restores them.
        """
        from peft.utils import get_peft_model_state_dict

        for name, denoiser in self.denoisers().items():
            target = folder if name == "transformer" else folder / name
            if not self.loads_lora:
                denoiser.save_lora_adapter(target, adapter_name="default")  # type: ignore[operator]
                continue
            arguments: dict[str, Any] = {
                "transformer_lora_layers": get_peft_model_state_dict(denoiser),
                # Without this header the loader would set alpha to the rank.
                "transformer_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),  # type: ignore
            }
            type(self.pipe).save_lora_weights(str(target), **arguments)
