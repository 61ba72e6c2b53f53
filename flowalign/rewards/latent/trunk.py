"""The first blocks of a denoiser, as a feature extractor for noisy latents."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel
    from flowalign.types import Conditioning


class _Stopped(Exception):  # noqa: N818 - not an error
    """Ends a forward pass early and carries the tokens out of it."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


class _Stop(nn.Module):
    """Replaces the first removed block. In every family its first argument is the media tokens."""

    def forward(self, *args: Tensor, **named: Any) -> NoReturn:
        raise _Stopped(args[0] if args else named["hidden_states"])


class _PipelineProxy:
    """Proxy of a pipeline that replaces its denoisers."""

    def __init__(self, pipe: Any, denoisers: dict[str, nn.Module]) -> None:
        self.__dict__.update(denoisers, _pipe=pipe)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pipe"], name)


class Trunk(nn.Module):
    """A copy of the first `blocks` blocks of a denoiser; later ones are neither run nor stored.

    It is called through a copy of the family's adapter and so has its conventions for noise levels, layouts and text.
    If the model has two experts, the one for low noise is used.
    """

    def __init__(self, model: FlowModel, blocks: int) -> None:
        super().__init__()
        if model.quantised is not None:
            raise ValueError(
                f"a latent reward is made of whole blocks, and these are held in {model.quantised}: use "
                "model.quantised=null, or another reward."
            )
        denoisers = model.denoisers()
        whole = list(denoisers.values())[-1]
        every = main_blocks(whole)
        if not 1 <= blocks < len(every):
            raise ValueError(
                f"a latent reward is made of the first 1 to {len(every) - 1} of the {len(every)} blocks of this model "
                f"(got {blocks})."
            )
        # The memo makes deepcopy replace later blocks by _Stop without copying them. The list keeps its length, from
        # which some networks count.
        self.network: nn.Module = copy.deepcopy(whole, {id(block): _Stop() for block in every[blocks:]})
        self.kept = blocks
        self.view = copy.copy(model)
        self.view.pipe = _PipelineProxy(model.pipe, dict.fromkeys(denoisers, self.network))

    @property
    def blocks(self) -> list[nn.Module]:
        """The kept blocks."""
        return main_blocks(self.network)[: self.kept]

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Output tokens (B, L, D) of the last kept block; x (B, …), sigma (B,) and cond as for `velocity`.

        Only the conditional branch is run. In families that concatenate text and media tokens, text is included.
        """
        try:
            self.view.unguided(x, sigma, cond)
        except _Stopped as stopped:
            return stopped.tokens
        raise RuntimeError(f"{type(self.view).__name__} did not reach the end of the kept blocks.")


def main_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The main blocks in order of execution, without refiners of a single input."""
    lists = {name: m for name, m in denoiser.named_children() if isinstance(m, nn.ModuleList)}
    return [block for name, blocks in lists.items() if not name.endswith("refiner") for block in blocks]
