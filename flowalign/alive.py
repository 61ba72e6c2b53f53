"""The most memory that tensors take while something runs; on fake ones, which have sizes and no memory, for nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Inside, bytes of the storages that operations make are counted until they are gone.

    Storages of `known` tensors do not count, nor what an operation makes and drops itself.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def faked(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, tensors are fake, and so are the weights of these modules, which it tells; blocks are not compiled."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # some families keep tensors that are no buffers
    weights: list[Tensor] = []
    with ExitStack() as inside:
        inside.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            fakes: dict[str, Tensor] = {
                n: mode.from_tensor(t) for n, t in [*module.named_parameters(), *module.named_buffers()]
            }
            inside.enter_context(_reparametrize_module(module, fakes))
            weights += fakes.values()
        inside.enter_context(mode)
        yield weights
