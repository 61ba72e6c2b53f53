"""The first blocks of a denoiser, as a network of its own that looks at noisy latents."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

if TYPE_CHECKING:
    from flowalign.models.base import FlowModel
    from flowalign.types import Conditioning


class _Stopped(Exception):  # noqa: N818 - nothing is wrong
    """Carries the tokens out of a forward pass that goes no further."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


class _Stop(nn.Module):
    """Stands where the first block that is left out was. Every family hands the tokens of the media in first."""

    def forward(self, *args: Tensor, **named: Any) -> NoReturn:
        raise _Stopped(args[0] if args else named["hidden_states"])


class _PipelineProxy:
    """A pipeline with other denoisers."""

    def __init__(self, pipe: Any, denoisers: dict[str, nn.Module]) -> None:
        self.__dict__.update(denoisers, _pipe=pipe)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_pipe"], name)


class Trunk(nn.Module):
    """A copy of a denoiser up to and with its `blocks`-th block; the later ones are never run nor held.

    It is driven by a copy of the family's adapter, hence speaks of noise levels, layouts and text as that does. Of two
    experts it is the one for little noise.
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
        # A list keeps its length, from which some networks count, and what is left out is not even copied.
        self.network: nn.Module = copy.deepcopy(whole, {id(block): _Stop() for block in every[blocks:]})
        self.kept = blocks
        self.view = copy.copy(model)
        self.view.pipe = _PipelineProxy(model.pipe, dict.fromkeys(denoisers, self.network))

    @property
    def blocks(self) -> list[nn.Module]:
        """Those that are kept."""
        return main_blocks(self.network)[: self.kept]

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Tokens (B, L, D) that the last kept block leaves; x (B, …), sigma (B,) and cond as for `velocity`.

        Only the conditional branch is looked at. Tokens of text are among them where a family has joined them before.
        """
        try:
            self.view.unguided(x, sigma, cond)
        except _Stopped as stopped:
            return stopped.tokens
        raise RuntimeError(f"{type(self.view).__name__} did not come to the end of the kept blocks.")


def main_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated blocks in the order in which they run, without those that only refine one of the inputs."""
    lists = {name: m for name, m in denoiser.named_children() if isinstance(m, nn.ModuleList)}
    return [block for name, blocks in lists.items() if not name.endswith("refiner") for block in blocks]
