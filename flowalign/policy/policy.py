"""The trained weights and their frozen copies, as one module.

A frozen copy (reference, old policy, average) holds only the *trained* parameters: for adapters these are few, and the
reference is their initial state. `use` swaps values in place, so parameters, wrappers and compiled code stay valid.
"""

from __future__ import annotations

from collections import OrderedDict
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


class FrozenCopy(nn.ParameterDict):
    """Values of the trained parameters. A copy on the CPU stays there when the policy is moved."""

    def __init__(self, values: dict[str, nn.Parameter], place: Place) -> None:
        # Parameter names must not contain dots, and those of a plain dict would be sorted.
        super().__init__(OrderedDict((name.replace(".", "/"), p) for name, p in values.items()))
        self.place = place

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenCopy:
        return self if self.place == "cpu" else super()._apply(fn, recurse)

    def pin(self) -> None:
        """Pin the values, once, for fast transfers. This takes up to twice the memory; sharded ones are not pinned."""
        for value in self.values():
            if not (is_sharded(value) or value.is_pinned()):
                value.data = value.data.pin_memory()


class Policy(nn.Module):
    """`denoisers` by name, prepared by `tune`, and frozen copies named `copies`, initialised to the live weights.

    device_of_frozen="cpu" keeps the copies in CPU memory: an accelerator then holds one set of weights, and each use
    costs a transfer of the trained parameters.
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
        """shard: shards the denoisers, called after `tune` and before the copies are made.

        merge: merge adapters into the weights within `use`, if the weights are unsharded and in float32.
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
        # The modules that hold them, since a strategy may replace parameters; a search takes milliseconds per use.
        self._holders = {
            name: (self.denoisers.get_submodule(place), leaf)
            for name, p in self.denoisers.named_parameters()
            if p.requires_grad
            for place, _, leaf in [name.rpartition(".")]
        }
        self.copies = nn.ModuleDict({name: self._copy() for name in copies})
        self.snapshots: dict[str, FrozenCopy] = {}
        """Temporary copies: not part of this module's state, so in no checkpoint."""
        self.merge = merge and can_merge(self.denoisers)
        self._active: str | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """The live trained parameters by name, in a fixed order."""
        return {name: getattr(holder, leaf) for name, (holder, leaf) in self._holders.items()}

    def _copy(self) -> FrozenCopy:
        def value(p: Tensor) -> Tensor:
            return p.detach().cpu().clone() if self.device_of_frozen == "cpu" else p.detach().clone()

        values = {n: nn.Parameter(value(p), requires_grad=False) for n, p in self.trained().items()}
        return FrozenCopy(values, self.device_of_frozen)

    @torch.no_grad()
    def take_snapshot(self, name: str) -> None:
        """Copy the live weights to CPU memory, for `use` only, until `drop_snapshot`."""
        values = {n: local(p.data).to("cpu", copy=True) for n, p in self.trained().items()}
        self.snapshots[name] = FrozenCopy({n: nn.Parameter(t, requires_grad=False) for n, t in values.items()}, "cpu")

    def drop_snapshot(self, name: str) -> None:
        """Free a snapshot; does nothing if there is none of this name."""
        self.snapshots.pop(name, None)

    def _pairs(self, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The live tensors and those of a copy, in the same order; of sharded ones the local shards."""
        copy = self.snapshots[name] if name in self.snapshots else self.copies[name]
        kept = copy.parameters(recurse=False)  # in the order in which they were copied
        return [local(p.data) for p in self.trained().values()], [local(p.data) for p in kept]

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Within this context, the live network has the weights of a copy (None: its own) and records no gradients.

        A copy that is in use already may be asked for again, which costs nothing.
        """
        with torch.no_grad(), ExitStack() as stack:
            if name is not None and name == self._active:
                yield
                return
            if name is not None:
                stack.enter_context(self._swapped(name))
            if self.merge:
                stack.enter_context(merged(self.denoisers))
            yield

    @contextmanager
    def _swapped(self, name: str) -> Iterator[None]:
        if self._active is not None:
            raise RuntimeError(f"copy {self._active!r} is in use; copies cannot be nested.")
        self._swap(name)
        self._active = name
        try:
            yield
        finally:
            self._active = None
            self._swap(name)

    def _swap(self, name: str) -> None:
        permanent = name in self.copies  # pinning a snapshot would take longer than it saves
        if permanent and self.device_of_frozen == "cpu" and any(p.is_cuda for p in self.trained().values()):
            self.copies[name].pin()  # type: ignore[operator]
        swap(*self._pairs(name))

    @torch.no_grad()
    def follow(self, name: str, decay: float) -> None:
        """copy ← decay · copy + (1 - decay) · live."""
        live, copy = self._pairs(name)
        if decay == 0:  # lerp would give the live weights only up to rounding
            torch._foreach_copy_(copy, live)
        elif decay != 1:
            if self.device_of_frozen == "cpu":
                live = [p.cpu() for p in live]
            torch._foreach_lerp_(copy, live, 1 - decay)

    @torch.no_grad()
    def copy_into_live(self, name: str) -> None:
        """Set the live weights to those of a copy, for export and sampling."""
        live, copy = self._pairs(name)
        torch._foreach_copy_(live, copy)

    def parameter_counts(self) -> dict[str, int]:
        """The numbers of all parameters and of the trained ones."""
        return {
            "parameters": sum(p.numel() for p in self.denoisers.parameters()),
            "trained": sum(p.numel() for p in self.trained().values()),
        }

    def checkpoint_keys(self) -> set[str]:
        """Keys of the state dict that a checkpoint stores: the trained parameters and the frozen copies."""
        trained = {f"denoisers.{name}" for name in self.trained()}
        return trained | {key for key in self.state_dict() if key.startswith("copies.")}
