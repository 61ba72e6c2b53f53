"""The adapter protocol: the thin truth about one diffusers pipeline.

Outside an adapter there is one convention (flow.py): spatial float32 latents, sigma in [0, 1], v = eps - x0. Sign,
time scale, packing, guidance and VAE normalisation are settled here and nowhere else.
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
from flowalign.models.loading import READERS, VIEWERS, fingerprint, load_pipeline
from flowalign.models.quantised import Kind, packing, quantise
from flowalign.types import Conditioning

NEGATIVE = "neg."
"""Key prefix of the unconditional branch in a Conditioning."""
SHARED = "cond."
"""Key prefix of what both branches see, such as the latents of a given picture."""


def _released(prompts: Sequence[str], *others: Any, **also: Any) -> Conditioning:
    raise RuntimeError(
        f"{prompts[0]!r} cannot be encoded: the text encoders were released (encoding.release=true), and this prompt "
        "was not encoded before, or its cached file is damaged."
    )


def _times(sigma: Tensor | float, x: Tensor) -> Tensor:
    """(B,) = 1000 sigma, beside x (B, …)."""
    return 1000 * torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))


def _positive(cond: Conditioning) -> Conditioning:
    return Conditioning({key: entry for key, entry in cond.items() if not key.startswith(NEGATIVE)})


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
    guidance_off: ClassVar[float] = 1.0
    """Classifier-free guidance at or below this is off."""
    evenly: ClassVar[bool] = True
    """Whether the pipeline passes even sigmas to its scheduler; otherwise the scheduler spaces them itself."""
    default_embedded_guidance: ClassVar[float | None] = None
    """Guidance that a distilled network takes as an input, apart from the classifier-free one; None: it takes none."""
    sees_images: ClassVar[bool] = False
    """Whether a prompt comes with pictures: editing, or a first frame."""
    checkpointing_is_exact: ClassVar[bool] = True
    """Whether the network predicts the same under gradient checkpointing."""
    one_text_length: ClassVar[bool] = True
    """Whether every prompt becomes equally many tokens; otherwise a batch is padded to its longest."""

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
        embedded_guidance: float | None = None,
        quantised: Kind | None = None,
    ) -> None:
        """max_sequence_length counts text tokens (null = the family's default); `absent` components are not loaded.

        embedded_guidance is the input of a guidance-distilled network, in rollouts, training and evaluation alike.
        quantised: the denoisers' blocks are held in so many bits, frozen; they still compute in `train_dtype`.
        """
        if embedded_guidance is not None and self.default_embedded_guidance is None:
            raise ValueError(
                f"{type(self).__name__} takes no embedded_guidance: use rollout.guidance, "
                f"which is off at {self.guidance_off:g}."
            )
        given = self.default_embedded_guidance if embedded_guidance is None else embedded_guidance
        self.embedded_guidance = given or 0.0  # 0 where the network takes none
        self.pretrained, self.revision, self.absent = pretrained, revision, tuple(absent)
        self.quantised = quantised
        pack = None if quantised is None else packing(quantised)  # refused before anything is read
        self.max_sequence_length = max_sequence_length or self.default_max_sequence_length
        self.lora_targets = tuple(lora_targets or self.default_lora_targets)
        self.pipe = load_pipeline(
            self.pipeline, pretrained, revision, variant, torch_dtype(dtype), dict.fromkeys(absent), self.denoiser_names
        )
        for denoiser in self.denoisers().values():
            if denoiser.dtype != torch_dtype(train_dtype):  # diffusers warns of every cast, also of an empty one
                denoiser.to(torch_dtype(train_dtype))
            denoiser.eval().requires_grad_(False)
        if quantised is not None and pack is not None:
            quantise(self.blocks(), quantised, pack)
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

    def agree(self, wanted: Tensor) -> Tensor:
        """(n,) bool: which networks any rank asks for. A strategy that has all ranks ask together replaces this."""
        return wanted

    # ------------------------------------------------------------ size and schedule

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this, in pixels."""
        return self.pipe.vae_scale_factor * 2

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        """Raises ValueError, naming the nearest possible size, for one that the family cannot make."""
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
        """Channels of the spatial latent outside of the network."""
        return self.pipe.transformer.config.in_channels

    def latent_shape(self, height: int, width: int, frames: int | None = None) -> tuple[int, ...]:
        """Shape of one latent, such that randn(B, *shape) is the noise the pipeline itself would draw."""
        del frames
        scale = self.pipe.vae_scale_factor
        return (self.latent_channels, height // scale, width // scale)

    def tokens(self, height: int, width: int, frames: int | None = None) -> int:
        """Number of picture tokens, which a resolution-dependent shift counts: patches of 2×2 latents."""
        _, *sides = self.latent_shape(height, width, frames)
        return math.prod(sides) // 4

    def mu(self, num_steps: int, height: int, width: int, frames: int | None) -> float | None:
        """Exponent of a shift that depends on the resolution; None where the shift is static."""
        del num_steps
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return None
        return schedule.linear_mu(config, self.tokens(height, width, frames))

    def sigmas(self, num_steps: int, height: int, width: int, frames: int | None = None) -> Tensor:
        """(num_steps + 1,) float32 from 1 to 0 on the CPU: exactly what the pipeline's own call would walk."""
        scheduler = schedule.euler(self.pipe.scheduler)
        evenly = self.evenly or scheduler is not self.pipe.scheduler  # the multistep ones space evenly, then shift
        return schedule.sigmas(scheduler, num_steps, evenly, self.mu(num_steps, height, width, frames))

    def shift(self, height: int, width: int, frames: int | None = None) -> float:
        """How far the schedule is moved towards the noise: sigma = s u / (1 + (s - 1) u) of an even time u, s ≥ 1."""
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
        """Text to Conditioning, one row a prompt; `negatives` adds the unconditional branch under "neg.".

        Families that see pictures (`sees_images`) also take these, (n, 3, H, W) in [0, 1] for each prompt, and the
        (height, width, frames) of what will be made; what becomes of them is under "cond.". The others leave both out.
        A family whose two branches are made differently, or whose text encoder sees the pictures, writes this itself.
        """
        cond = self.text(prompts)
        if negatives is not None:
            cond |= {f"{NEGATIVE}{key}": entry for key, entry in self.text(negatives).items()}
        if self.sees_images:
            cond |= self.seen(prompts, images, size)
        return cond

    def text(self, texts: Sequence[str]) -> Conditioning:
        """One branch of it, a row a text."""
        raise NotImplementedError(f"{type(self).__name__} needs text(), or an encode() of its own.")

    def seen(
        self, prompts: Sequence[str], images: Sequence[Tensor] | None, size: tuple[int, int, int | None] | None
    ) -> Conditioning:
        """What becomes of the pictures, under "cond."; only for families with `sees_images`."""
        raise NotImplementedError(f"{type(self).__name__} needs seen().")

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, branch: Conditioning) -> Tensor:
        """v of one branch. x (B, …) spatial, t (B,) = 1000 sigma in float32, branch without the unconditional part."""

    def unguided(self, x: Tensor, sigma: Tensor | float, cond: Conditioning) -> Tensor:
        """v of the conditional branch in one forward, whatever the noise levels; otherwise as `velocity`."""
        return self.forward(x, _times(sigma, x), _positive(cond)).float()

    def velocity(
        self, x: Tensor, sigma: Tensor | float, cond: Conditioning, guidance: float = 1.0, through_both: bool = True
    ) -> Tensor:
        """v = eps - x0 in float32, (B, …). sigma is a number or (B,); guidance is classifier-free and off at 1.

        through_both=False leaves the unconditional branch without gradient, and without its activations.
        """
        if guidance <= self.guidance_off:
            return self.unguided(x, sigma, cond)
        t, positive = _times(sigma, x), _positive(cond)
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
        """The guided velocity, (B, …) of two of them."""
        return v_negative + guidance * (v_positive - v_negative)

    def denormalised(self, x: Tensor) -> Tensor:
        """Latents as the VAE knows them."""
        config = self.pipe.vae.config
        return x / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def normalised(self, z: Tensor) -> Tensor:
        """The inverse: latents as the denoiser knows them."""
        config = self.pipe.vae.config
        return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents to pictures (B, 3, H, W), or videos (B, F, 3, H, W), float32 in [0, 1]."""
        vae = self.pipe.vae
        media = vae.decode(self.denormalised(x).to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5
        return media.clamp(0, 1).contiguous()  # running.vae_channels_last leaves them otherwise

    @torch.no_grad()
    def encode_images(self, media: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] to latents in float32, normalised as the denoiser knows them."""
        vae = self.pipe.vae
        return self.normalised(vae.encode((2 * media - 1).to(vae.dtype), return_dict=False)[0].mode().float())

    # ------------------------------------------------------------ text encoders

    def text_fingerprint(self) -> str:
        """What the encoding of a prompt depends on beside its text; an encoding kept on disk belongs to one."""
        encoder = next((m for name, m in self.text_encoders().items()), None)
        kind = f"{type(self).__name__} {self.max_sequence_length} {getattr(encoder, 'dtype', None)} {self.absent}"
        folders = (*READERS, *VIEWERS) if self.sees_images else READERS
        return f"{kind} {fingerprint(self.pretrained, self.revision, folders)}"

    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their names in the pipeline."""
        parts = {name: part for name, part in self.pipe.components.items() if name.startswith("text_encoder")}
        return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def release_text_encoders(self) -> None:
        """Lets go of their memory; nothing can be encoded afterwards."""
        self.pipe.register_modules(**dict.fromkeys(self.text_encoders()))
        self.encode = _released  # type: ignore[method-assign]

    # ------------------------------------------------------------ files

    def blocks(self) -> list[nn.Module]:
        """The repeated units of the denoisers, for sharding, compilation and checkpointing."""
        lists = [m for d in self.denoisers().values() for m in d.children() if isinstance(m, nn.ModuleList)]
        return [block for blocks in lists for block in blocks]

    def share_sequences(self, context: int, mesh: Any) -> None:
        """Splits sequences over neighbouring ranks by diffusers' plans. mesh has the dims (…, "ring", "ulysses")."""
        from diffusers import ContextParallelConfig

        for denoiser in self.denoisers().values():
            denoiser.enable_parallelism(config=ContextParallelConfig(ulysses_degree=context, mesh=mesh))  # type: ignore

    @property
    def loads_lora(self) -> bool:
        """Whether the pipeline has a loader of adapters; otherwise its denoisers load them."""
        return hasattr(type(self.pipe), "save_lora_weights")

    def save_lora(self, folder: Path) -> None:
        """Writes the adapters; `load_lora_weights(folder)` restores them with the right alpha.

        A further denoiser's are in folder/NAME, for `load_lora_weights(folder/NAME, load_into_NAME=True)`. Where the
        pipeline has no loader, they are for the denoiser's `load_lora_adapter(folder, prefix=None,
        use_safetensors=True)`.
        """
        from peft.utils import get_peft_model_state_dict

        for name, denoiser in self.denoisers().items():
            place = folder if name == "transformer" else folder / name
            if not self.loads_lora:
                denoiser.save_lora_adapter(place, adapter_name="default")  # type: ignore[operator]
                continue
            arguments: dict[str, Any] = {
                "transformer_lora_layers": get_peft_model_state_dict(denoiser),
                # Without this header alpha would come back as the rank.
                "transformer_lora_adapter_metadata": denoiser.peft_config["default"].to_dict(),  # type: ignore
            }
            type(self.pipe).save_lora_weights(str(place), **arguments)
