"""The trained weights and their frozen copies, as one module.

A frozen copy (reference, old policy, average) holds the *trained* parameters only: for adapters that is tiny, and the
reference is then the adapter's own start. `use` exchanges values in place, so parameter identity, wrappers and
compiled code are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from flowalign.policy.merge import can_merge, merged
from flowalign.policy.tune import Tune
from flowalign.tensors import is_sharded, local
from flowalign.transfer import swap

Place = Literal["same", "cpu"]


class Copy(nn.ParameterDict):
    """Values of the trained parameters. One that is held on the CPU stays there when the policy moves."""

    def __init__(self, values: dict[str, nn.Parameter], place: Place) -> None:
        # Dots cannot stand in a parameter's own name.
        super().__init__({name.replace(".", "/"): p for name, p in values.items()})
        self.place = place

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Copy:
        return self if self.place == "cpu" else super()._apply(fn, recurse)

    def page_lock(self) -> None:
        """Once, for quick transfers. Each value then takes up to twice its memory; those in shards stay as they are."""
        for value in self.values():
            if not (is_sharded(value) or value.is_pinned()):
                value.data = value.data.pin_memory()


class Policy(nn.Module):
    """`denoisers` by name, prepared by `tune`; `copies` names the frozen copies, which start at the live weights.

    device_of_frozen="cpu" keeps the copies in the machine's memory: an accelerator then holds one set of weights, and
    each use costs a transfer of the trained parameters.
    """

    def __init__(
        self,
        denoisers: dict[str, nn.Module],
        tune: Tune,
        targets: Sequence[str],
        copies: Sequence[str] = (),
        device_of_frozen: Place = "same",
        shard: Callable[[], None] | None = None,
        merge: bool = False,
    ) -> None:
        """shard: cuts the denoisers into shards, once they are prepared and before they are copied.

        merge: within `use` adapters are folded into the weights, where these are whole and in float32.
        """
        super().__init__()
        if device_of_frozen not in ("same", "cpu"):
            raise ValueError(f'device_of_frozen is "same" or "cpu" (got {device_of_frozen!r}).')
        self.device_of_frozen: Place = device_of_frozen
        for name, denoiser in denoisers.items():
            tune(denoiser, targets, name)
        if shard is not None:
            shard()
        self.denoisers = nn.ModuleDict(denoisers)
        self.copies = nn.ModuleDict({name: self._copy() for name in copies})
        self.passing: dict[str, Copy] = {}
        """Copies that are kept for a while: in no checkpoint, and no part of this module."""
        self.merge = merge and can_merge(self.denoisers)
        self._active: str | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """The live trained parameters by name, in a fixed order."""
        return {name: p for name, p in self.denoisers.named_parameters() if p.requires_grad}

    def _copy(self) -> Copy:
        def value(p: Tensor) -> Tensor:
            return p.detach().cpu().clone() if self.device_of_frozen == "cpu" else p.detach().clone()

        values = {n: nn.Parameter(value(p), requires_grad=False) for n, p in self.trained().items()}
        return Copy(values, self.device_of_frozen)

    @torch.no_grad()
    def keep(self, name: str) -> None:
        """One more copy of the live weights, in the machine's memory until it is let go; it is for `use` alone."""
        values = {n: local(p.data).to("cpu", copy=True) for n, p in self.trained().items()}
        self.passing[name] = Copy({n: nn.Parameter(t, requires_grad=False) for n, t in values.items()}, "cpu")

    def let_go(self, name: str) -> None:
        """Frees a copy that `keep` has made; any other stays."""
        self.passing.pop(name, None)

    def _pairs(self, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        copy = self.passing[name] if name in self.passing else self.copies[name]
        live = self.trained()
        shards = [local(p.data) for p in live.values()]
        return shards, [local(copy[n.replace(".", "/")].data) for n in live]  # type: ignore

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Inside, the live network has the weights of a copy (None: its own) and no gradient is recorded."""
        with torch.no_grad(), ExitStack() as inside:
            if name is not None:
                inside.enter_context(self._as(name))
            if self.merge:
                inside.enter_context(merged(self.denoisers))
            yield

    @contextmanager
    def _as(self, name: str) -> Iterator[None]:
        if self._active is not None:
            raise RuntimeError(f"copy {self._active!r} is in use; copies cannot be nested.")
        self._exchange(name)
        self._active = name
        try:
            yield
        finally:
            self._active = None
            self._exchange(name)

    def _exchange(self, name: str) -> None:
        lasting = name in self.copies  # to lock the pages of another would take longer than it saves
        if lasting and self.device_of_frozen == "cpu" and any(p.is_cuda for p in self.trained().values()):
            self.copies[name].page_lock()  # type: ignore[operator]
        swap(*self._pairs(name))

    @torch.no_grad()
    def follow(self, name: str, decay: float) -> None:
        """copy ← decay · copy + (1 - decay) · live."""
        live, copy = self._pairs(name)
        if decay == 0:  # exactly the live weights, which lerp gives only up to rounding
            torch._foreach_copy_(copy, live)
        elif decay != 1:
            if self.device_of_frozen == "cpu":
                live = [p.cpu() for p in live]
            torch._foreach_lerp_(copy, live, 1 - decay)

    @torch.no_grad()
    def copy_into_live(self, name: str) -> None:
        """The live weights become those of a copy, for export and sampling."""
        live, copy = self._pairs(name)
        torch._foreach_copy_(live, copy)

    def numbers(self) -> dict[str, int]:
        """How many parameters there are in all and how many are trained."""
        return {
            "parameters": sum(p.numel() for p in self.denoisers.parameters()),
            "trained": sum(p.numel() for p in self.trained().values()),
        }

    def kept_keys(self) -> set[str]:
        """Keys of the state dict that a checkpoint holds: what is trained, and the frozen copies."""
        kept = {f"denoisers.{name}" for name in self.trained()}
        return kept | {key for key in self.state_dict() if key.startswith("copies.")}
