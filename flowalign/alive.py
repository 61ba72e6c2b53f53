"""Peak memory of the tensors that some code allocates; with fake tensors, measured without allocating any."""

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


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate inside the context, until they are freed.

    Storages of `known` tensors are not counted, nor temporary buffers inside an operation.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def fake_tensors(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Make tensors fake inside, the weights of these modules included, which are yielded. Blocks are not compiled."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # some families keep tensors that are not registered as buffers
    weights: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            fakes: dict[str, Tensor] = {
                n: mode.from_tensor(t) for n, t in [*module.named_parameters(), *module.named_buffers()]
            }
            stack.enter_context(_reparametrize_module(module, fakes))
            weights += fakes.values()
        stack.enter_context(mode)
        yield weights
