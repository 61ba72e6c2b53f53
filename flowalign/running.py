"""How the networks run: memory against time, without another result but for rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from flowalign.attention import use_float32_attention_on_cpu
from flowalign.heap import keep_freed

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel

VARIANTS = 256
"""Of a block's code: with a gradient and without, by sizes of batches and pictures, for the odd last block. Past the
compiler's own limit of 8 what is new runs as it is, with no more than a warning; a run with evaluations has more."""


@dataclass(frozen=True)
class Running:
    """Settings of the denoisers and the VAE; all are off where nothing is said."""

    gradient_checkpointing: bool = False
    """Forget what is inside a block and compute it again on the way back: a third more time, far less memory."""
    compile: bool = False
    """torch.compile for one block after the other, which share their code: minutes at first, a quarter off later.

    Sizes have code of their own where they are few, so that the code does not depend on the sizes that came before.
    """
    merge_adapters: bool = True
    """Fold adapters into the weights where nothing is trained; in float32, on weights that are whole."""
    attention: str | None = None
    """Name of a diffusers attention backend, e.g. flash, _flash_3, sage; None: PyTorch's own."""
    vae_tiling: bool = False
    """Decode large pictures tile by tile. Seams are blended, hence pixels differ slightly."""
    vae_slicing: bool = False
    """Decode the pictures of a batch one by one."""
    vae_channels_last: bool = False
    """Keep the VAE's weights and activations with the channels last in memory."""
    keep_freed: bool = False
    """Memory that is free again stays with the process (glibc): without new pages for every pass on a CPU."""

    @property
    def native(self) -> bool:
        """Whether attention is PyTorch's own, in which operations and memory can be counted."""
        return (self.attention or "native").lstrip("_").startswith("native")

    def check(self, device: torch.device) -> None:
        """Raises ValueError for what is not installed for this device."""
        if self.compile:
            from flowalign.compiling import check_compiler

            check_compiler(device)

    def apply(self, model: FlowModel, rows_vary: bool = False) -> None:
        """To the pipeline as the policy has prepared it. Raises ValueError for what the family cannot do.

        rows_vary: whether training batches are of any size.
        """
        if self.gradient_checkpointing and not model.checkpointing_is_exact:
            raise ValueError(
                f"{type(model).__name__} predicts something else under gradient checkpointing, since diffusers then "
                "drops its attention mask: use running.gradient_checkpointing=false."
            )
        use_float32_attention_on_cpu()
        for denoiser in model.denoisers().values():
            if self.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            if self.attention is not None:
                denoiser.set_attention_backend(self.attention)  # type: ignore[operator]
        if self.keep_freed:
            keep_freed()
        if self.compile:
            from flowalign.compiling import COMPILED  # brings the compiler, which takes a second

            limits = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
            sizes_are_few = model.one_text_length and not rows_vary
            for block in model.blocks():
                block.compile(options=COMPILED, dynamic=False if sizes_are_few else None)
        for wanted, switch in ((self.vae_tiling, "enable_tiling"), (self.vae_slicing, "enable_slicing")):
            if wanted:
                if not hasattr(model.pipe.vae, switch):
                    raise ValueError(f"the VAE of {type(model).__name__} has no {switch}().")
                getattr(model.pipe.vae, switch)()
        if self.vae_channels_last:
            _channels_last(model)


def _channels_last(model: FlowModel) -> None:
    if any(isinstance(part, nn.Conv3d) for part in model.pipe.vae.modules()):
        raise ValueError(
            f"the VAE of {type(model).__name__} has 3-d convolutions, and running.vae_channels_last is for 2-d ones: "
            "use running.vae_channels_last=false."
        )
    model.pipe.vae.to(memory_format=torch.channels_last)
