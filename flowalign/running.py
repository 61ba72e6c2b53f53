"""How the networks run: trade memory for time, with results that differ only by rounding."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flowalign.attention import use_float32_attention_on_cpu
from flowalign.checks.suggest import suggest
from flowalign.heap import keep_freed

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel

VARIANTS = 256
"""Limit on compiled variants of a block: with and without gradient, by batch and image size, for a different last
block. Beyond the compiler's own limit of 8, which a run with evaluations exceeds, new variants run uncompiled with only
a warning."""

DEFAULT_ATTENTION = "DIFFUSERS_ATTN_BACKEND"
"""Environment variable from which diffusers reads the attention backend of networks for which none is set."""


@dataclass(frozen=True)
class Running:
    """Execution settings of the denoisers and the VAE."""

    gradient_checkpointing: bool = False
    """Recompute the activations of a block in the backward pass: a third more time, far less memory."""
    compile: bool = False
    """Compile each block with torch.compile, with shared code: minutes at the start, then a quarter less time.

    Where there are few sizes, each has its own (static) code, so that the code does not depend on earlier sizes.
    """
    merge_adapters: bool = True
    """Merge adapters into the weights while nothing is trained; only in float32 and for unsharded weights."""
    attention: str | None = None
    """Name of a diffusers attention backend with a backward pass, e.g. flash, xformers; None: PyTorch's own."""
    vae_tiling: bool = False
    """Decode large images tile by tile. Seams are blended, hence pixels differ slightly."""
    vae_slicing: bool = False
    """Decode the images of a batch one by one."""
    vae_channels_last: bool = False
    """Keep the VAE's weights and activations in the channels-last memory format."""
    keep_freed: bool = False
    """Keep freed memory in the process (glibc), so that a pass on a CPU does not fetch new pages every time."""

    @property
    def native(self) -> bool:
        """Whether attention is PyTorch's own, for which FLOPs and memory can be counted."""
        return (self.attention or "native").lstrip("_").startswith("native")

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise ValueError if something does not work on this device, or with networks that compute in this dtype."""
        if self.compile:
            from flowalign.compiling import check_compiler

            check_compiler(device)
        own, default = self.attention, os.environ.get(DEFAULT_ATTENTION)
        if chosen := own or default:
            from flowalign.models.backends import check_gradient

            check_gradient(chosen, device, dtype, "running.attention" if own else DEFAULT_ATTENTION)

    def check_family(self, family: FlowModel | type[FlowModel]) -> None:
        """Raise ValueError for settings that a model family does not support. Needs no weights."""
        name = (family if isinstance(family, type) else type(family)).__name__
        if self.gradient_checkpointing and not family.checkpointing_is_exact:
            raise ValueError(
                f"{name} predicts something else under gradient checkpointing, since diffusers then drops "
                "its attention mask: use running.gradient_checkpointing=false."
            )
        if self.vae_channels_last and family.vae_in_3d:
            raise ValueError(
                f"the VAE of {name} has 3-d convolutions, and running.vae_channels_last is for 2-d ones: use "
                "running.vae_channels_last=false."
            )
        if self.attention is not None:
            _check_backend(self.attention, name, family.takes_attention_backend)

    def apply(self, model: FlowModel, rows_vary: bool = False) -> None:
        """Apply the settings to a pipeline that the policy has prepared.

        rows_vary: whether training batches vary in size. Raises ValueError for what the model family does not support.
        """
        self.check_family(model)
        use_float32_attention_on_cpu()
        for denoiser in model.denoisers().values():
            if self.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            if self.attention is not None:
                from flowalign.models.backends import set_backend

                set_backend(denoiser, self.attention)
        if self.keep_freed:
            keep_freed()
        if self.compile:
            from flowalign.compiling import COMPILE_OPTIONS  # imports the compiler, which takes a second

            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
            sizes_are_few = model.one_text_length and not rows_vary
            for block in model.blocks():
                block.compile(options=COMPILE_OPTIONS, dynamic=False if sizes_are_few else None)
        for wanted, switch in ((self.vae_tiling, "enable_tiling"), (self.vae_slicing, "enable_slicing")):
            if wanted:
                if not hasattr(model.pipe.vae, switch):
                    raise ValueError(f"the VAE of {type(model).__name__} has no {switch}().")
                getattr(model.pipe.vae, switch)()
        if self.vae_channels_last:
            model.pipe.vae.to(memory_format=torch.channels_last)


def _check_backend(name: str, family: str, any_backend: bool) -> None:
    from flowalign.models.backends import backends, check_installed, check_kernel

    if name not in (known := backends()):
        raise ValueError(f"running.attention={name} is no attention backend of diffusers; {suggest(name, known)}")
    if not any_backend:
        check_kernel(name, family)
    check_installed(name)
